"""Where a run's jobs are computed: in this process, on Ray actors, or by machines over ZeroMQ."""

from typing import TYPE_CHECKING, Any, Protocol

from offbeat.runtime.registry import Registry, Spec

if TYPE_CHECKING:
    from offbeat.runtime.crew import Crew
    from offbeat.runtime.experiment import Experiment
    from offbeat.runtime.loop import Loop
    from offbeat.runtime.records import Records

ENGINES = Registry("engine")


class Backend(Protocol):
    """The contract of an engine; ``spec`` is how a file names it."""

    spec: Spec | None
    clocks: tuple[str, ...]
    """The clocks it can keep; the first is the one it keeps where nothing is said."""

    def crew(self, experiment: "Experiment") -> "Crew | None":
        """Who computes the jobs of a method with a server; None: this process."""
        ...

    def gossip(self, experiment: "Experiment", records: "Records", **around: Any) -> "Loop | None":
        """What runs a gossip method; None: this process.

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

    def crew(self, experiment: "Experiment") -> "Crew | None":
        """Nobody else."""
        return None

    def gossip(self, experiment: "Experiment", records: "Records", **around: Any) -> "Loop | None":
        """Nobody else."""
        return None


@ENGINES.register("virtual")
def virtual() -> Virtual:
    """Everything in this process, under the virtual clock."""
    return Virtual()
