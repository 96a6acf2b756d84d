"""When a run stops, and when it evaluates."""

import math

from pydantic import Field, model_validator
from pydantic_core import ArgsKwargs

from offbeat.runtime.base.errors import ConfigError, nearest
from offbeat.runtime.base.registry import Count, Finite, Positive, settings
from offbeat.runtime.experiment.metrics import METRICS, directed

BOUNDS = ("steps", "seconds", "gradients", "wall_s")
DEFAULT_STEPS = 5000
EVALUATIONS = 100  # of a run, where nothing is said


@settings
class Stop:
    """A run ends at the first rule that is met.

    Any metric's name is one more: ``Stop(steps=5000, accuracy=0.9)``, in a file
    ``stop.accuracy = 0.9``, ends the run when an evaluation finds it there or better.

    Args:
        steps: server steps; rounds of gossip, on average over the nodes.
        seconds: virtual seconds.
        gradients: in the results that arrived; a local step is one.
        wall_s: real seconds of this process.
        targets: metric -> its level; what has no other name here goes there.
    """

    steps: Count | None = None
    seconds: Positive | None = None
    gradients: Count | None = None
    wall_s: Positive | None = None
    targets: dict[str, Finite] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: ArgsKwargs) -> ArgsKwargs:
        rules = dict(given.kwargs or {})
        if rules.pop("metric", "loss") != "loss":  # as former run folders have it, of no target
            raise ConfigError(
                "a target is said by its metric's name, as stop.accuracy = 0.9, and without "
                "stop.metric"
            )
        more = {key: rules.pop(key) for key in list(rules) if key not in (*BOUNDS, "targets")}
        for key, level in more.items():
            if isinstance(level, bool) or not isinstance(level, int | float):
                raise ConfigError(f'"{key}" should be a number, not {level!r}')
            if not math.isfinite(level):
                raise ConfigError(f'"{key}" should be a finite number, not {level}')
        return ArgsKwargs(given.args, rules | {"targets": rules.get("targets", {}) | more})

    def __post_init__(self) -> None:
        """A target alone may never be met."""
        if all(getattr(self, bound) is None for bound in BOUNDS):
            known = ", ".join(BOUNDS)
            for metric in self.targets:
                meant = "" if metric in METRICS else nearest(metric, [*directed(METRICS), *BOUNDS])
                raise ConfigError(
                    f"a target {metric} may never be reached; add one of {known}{meant}"
                )
            raise ConfigError(f"give one of {known}")


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
