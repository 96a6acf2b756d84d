"""Where a run's jobs are computed: in this process, on Ray actors, or by machines over ZeroMQ."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.base.registry import Count, Natural, NonNegative, Positive, Registry, Spec

ENGINES = Registry("engine")


@dataclass(frozen=True)
class Liveness:
    """Every time of a run on a network, from one.

    Args:
        suspect_after_s: silence after which a node is suspected: it gets no new work.
    """

    suspect_after_s: float = 1.0

    def __post_init__(self) -> None:
        """A setting that no network could meet is refused."""
        if not 0.05 <= self.suspect_after_s <= 3600:
            raise ConfigError(
                f"suspect_after_s must be from 0.05 to 3600, not {self.suspect_after_s}"
            )

    @property
    def heartbeat_s(self) -> float:
        """How often a node says that it is alive."""
        return self.suspect_after_s / 4

    @property
    def down_after_s(self) -> float:
        """Silence after which a node is dead, and its jobs are someone else's."""
        return 1.5 * self.suspect_after_s

    @property
    def resend_s(self) -> float:
        """When something that was not acknowledged is sent again at the earliest."""
        return self.suspect_after_s / 2

    @property
    def tick_s(self) -> float:
        """How often whoever runs this has to look at the clock."""
        return self.suspect_after_s / 10


class Engine:
    """Where a run's jobs are computed; ``spec`` is how a file names it.

    What this package's own begin is known to ``runtime.api.launch``; another says it here.
    """

    spec: Spec | None = None
    clocks: tuple[str, ...] = ("virtual",)
    """The clocks it can keep; the first is the one it keeps where nothing is said."""

    def backend(self, experiment: Any, folder: Path | None = None) -> Any:
        """The compute backend of a run; None: this process computes.

        Args:
            experiment: whose jobs.
            folder: of the run, if it has one.
        """
        return None

    def gossip(self, experiment: Any, records: Any, **around: Any) -> Any:
        """The loop of a gossip run; None: this process, whose gradients ``backend`` computes.

        Args:
            experiment: what to run.
            records: where everything is written.
            around: see ``Loop``, and the seed.
        """
        return None


class Virtual(Engine):
    """This process, under the virtual clock."""


@ENGINES.register("virtual")
def virtual() -> Virtual:
    """Everything in this process, under the virtual clock."""
    return Virtual()


@dataclass
class Ray(Engine):
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
class Zmq(Engine):
    """Machines over ZeroMQ; the fields are the arguments of ``zmq``."""

    spec: Spec | None = field(default=None, init=False)
    clocks: tuple[str, ...] = field(default=("real", "virtual"), init=False)
    bind: str
    keys: str
    processes: int | None
    suspect_after_s: float
    most_idle_s: float | None
    metrics: str


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
