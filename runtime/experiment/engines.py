"""Where a run's jobs are computed: in this process, on Ray actors, or by machines over ZeroMQ."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from offbeat.runtime.base.registry import Count, Natural, NonNegative, Positive, Registry, Spec
from offbeat.runtime.protocol.roster import Liveness

if TYPE_CHECKING:
    from offbeat.runtime.compute.backend import ComputeBackend
    from offbeat.runtime.experiment.experiment import Experiment
    from offbeat.runtime.run.loop import Loop
    from offbeat.runtime.run.records import Records

ENGINES = Registry("engine")


class Backend(Protocol):
    """The contract of an engine; ``spec`` is how a file names it."""

    spec: Spec | None
    clocks: tuple[str, ...]
    """The clocks it can keep; the first is the one it keeps where nothing is said."""

    def crew(self, experiment: "Experiment", folder: Path | None = None) -> "ComputeBackend | None":
        """Who computes the jobs of a run; None: this process.

        Args:
            experiment: whose jobs.
            folder: of the run, if it has one.
        """
        ...

    def gossip(self, experiment: "Experiment", records: "Records", **around: Any) -> "Loop | None":
        """What runs a gossip method; None: this process, and the crew, if there is one, computes.

        Args:
            experiment: what to run.
            records: where everything is written.
            around: see ``Loop``, and the seed.
        """
        ...


class Virtual:
    """This process, under the virtual clock."""

    spec: Spec | None = None
    clocks: tuple[str, ...] = ("virtual",)

    def crew(self, experiment: "Experiment", folder: Path | None = None) -> "ComputeBackend | None":
        """Nobody else."""
        return None

    def gossip(self, experiment: "Experiment", records: "Records", **around: Any) -> "Loop | None":
        """Nobody else."""
        return None


@ENGINES.register("virtual")
def virtual() -> Virtual:
    """Everything in this process, under the virtual clock."""
    return Virtual()


@dataclass
class Ray:
    """Ray actors; the fields are the arguments of ``ray``."""

    spec: Spec | None = field(default=None, init=False)
    clocks: tuple[str, ...] = field(default=("real", "virtual"), init=False)
    workers_per_actor: int
    address: str
    num_cpus: float
    num_gpus: float
    resources: dict[str, float] | None
    placement: str
    restarts: int
    device: str

    def crew(self, experiment: "Experiment", folder: Path | None = None) -> "ComputeBackend | None":
        """Actors."""
        from offbeat.runtime.on_ray.server import RayBackend

        return RayBackend(experiment, self, folder)

    def gossip(self, experiment: "Experiment", records: "Records", **around: Any) -> "Loop | None":
        """Actors that speak to one another, under a real clock."""
        if not experiment.real:
            return None
        from offbeat.runtime.on_ray.gossip import RayGossip

        return RayGossip(experiment, self, records, **around)


@ENGINES.register("ray")
def ray(
    workers_per_actor: Count = 1,
    *,
    address: str = "local",
    num_cpus: NonNegative = 0.0,
    num_gpus: NonNegative = 0.0,
    resources: dict[str, Positive] | None = None,
    placement: Literal["spread", "pack"] = "spread",
    restarts: Natural = 10,
    device: str = "cpu",
) -> Ray:
    """Ray actors, on this machine or a cluster, under a real clock or the virtual one.

    Args:
        workers_per_actor: how many workers share one process.
        address: "local" begins a Ray of this run's own; "auto" or "host:port" joins a cluster.
        num_cpus, num_gpus, resources: what Ray sets aside for each actor; with 0 CPUs as many
            actors as memory holds fit on a machine.
        placement: over all machines, or on as few as possible.
        restarts: how often each actor is replaced when its process dies.
        device: where a torch task computes, "cpu" or "cuda"; with ``num_gpus=1`` each actor has a
            GPU of its own.
    """
    return Ray(
        workers_per_actor, address, num_cpus, num_gpus, resources, placement, restarts, device
    )


@dataclass
class Zmq:
    """Machines over ZeroMQ; the fields are the arguments of ``zmq``."""

    spec: Spec | None = field(default=None, init=False)
    clocks: tuple[str, ...] = field(default=("real", "virtual"), init=False)
    bind: str
    keys: str
    processes: int | None
    suspect_after_s: float
    most_idle_s: float | None
    metrics: str

    def crew(self, experiment: "Experiment", folder: Path | None = None) -> "ComputeBackend | None":
        """Whoever joins."""
        from offbeat.runtime.on_zeromq.server import ZmqBackend

        return ZmqBackend(experiment, self, folder)

    def gossip(self, experiment: "Experiment", records: "Records", **around: Any) -> "Loop | None":
        """Peers on this machine, under a real clock."""
        if not experiment.real:
            return None
        from offbeat.runtime.on_zeromq.gossip import ZmqGossip

        return ZmqGossip(experiment, self, records, **around)


@ENGINES.register("zmq")
def zmq(
    bind: str = "tcp://127.0.0.1:*",
    *,
    keys: str = "",
    processes: Natural | None = None,
    suspect_after_s: Positive = 1.0,
    most_idle_s: Positive | None = None,
    metrics: str = "",
) -> Zmq:
    """Processes that share nothing but a network, on this machine and others.

    Args:
        bind: where the server listens; another address than this machine's own needs keys.
        keys: a folder of keys; see ``offbeat keys``.
        processes: workers begun on this machine; None: as many as the fleet has.
        suspect_after_s: silence after which a worker gets no new jobs; all other times follow.
        most_idle_s: without any worker for so long, the run ends; None: it waits.
        metrics: where Prometheus can read them: a port of this machine alone, or host:port.
    """
    Liveness(suspect_after_s)
    return Zmq(bind, keys, processes, suspect_after_s, most_idle_s, metrics)
