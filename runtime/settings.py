"""When a run stops, and when it evaluates."""

from offbeat.runtime.errors import ConfigError
from offbeat.runtime.registry import Count, Finite, Positive, settings

DEFAULT_STEPS = 5000
EVALUATIONS = 100  # of a run, where nothing is said


@settings
class Stop:
    """A run ends at the first rule that is met.

    Args:
        steps: server steps; rounds of gossip, on average over the nodes.
        seconds: virtual seconds.
        gradients: in the results that arrived; a local step is one.
        loss: a level of ``metric``, looked at when the run evaluates.
        metric: a column of the metrics: the full objective if nothing is said.
        wall_s: real seconds of this process.
    """

    steps: Count | None = None
    seconds: Positive | None = None
    gradients: Count | None = None
    loss: Finite | None = None
    metric: str = "loss"
    wall_s: Positive | None = None

    def __post_init__(self) -> None:
        """A target alone may never be met."""
        bounds = (self.steps, self.seconds, self.gradients, self.wall_s)
        if all(bound is None for bound in bounds):
            what = "a target loss may never be reached; add" if self.loss is not None else "give"
            raise ConfigError(f"{what} steps, seconds, gradients or wall_s")


@settings
class Evaluate:
    """Evaluate every so many steps, gradients or virtual seconds; it does not disturb the run."""

    steps: Count | None = None
    seconds: Positive | None = None
    gradients: Count | None = None

    @staticmethod
    def sensible(stop: Stop) -> "Evaluate":
        """About a hundred evaluations in all."""
        counts = {"steps": stop.steps, "gradients": stop.gradients}
        every = {key: max(1, end // EVALUATIONS) for key, end in counts.items() if end}
        if not every and stop.seconds is not None:
            return Evaluate(seconds=stop.seconds / EVALUATIONS)
        return Evaluate(**(every or {"steps": EVALUATIONS}))
