"""offbeat: asynchronous optimisation on fleets of unequal workers.

>>> import offbeat
>>> result = offbeat.run("logistic:digits", "shuffled(lr=0.5)", "16 lognormal(1.0)",
...                      stop={"steps": 500})
>>> result.final["accuracy"] > 0.8
True
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offbeat.runtime.api.api import Result, replay, resume, run
    from offbeat.runtime.base.errors import (
        ComputeError,
        ConfigError,
        Diverged,
        Fenced,
        OffbeatError,
        PeerError,
        Refused,
        StorageError,
    )
    from offbeat.runtime.experiment.experiment import Experiment
    from offbeat.runtime.experiment.settings import Evaluate, Stop
    from offbeat.runtime.join.run import join, weights
    from offbeat.workers.fleet import Fleet, Outage

# Imported when asked for: a process that only computes loads no more than it needs.
_FROM = {
    "offbeat.runtime.api.api": ("Result", "replay", "resume", "run"),
    "offbeat.runtime.base.errors": (
        *("ComputeError", "ConfigError", "Diverged", "Fenced"),
        *("OffbeatError", "PeerError", "Refused", "StorageError"),
    ),
    "offbeat.runtime.experiment.experiment": ("Experiment",),
    "offbeat.runtime.join.run": ("join", "weights"),
    "offbeat.runtime.experiment.settings": ("Evaluate", "Stop"),
    "offbeat.workers.fleet": ("Fleet", "Outage"),
}

__all__ = [
    "ComputeError",
    "ConfigError",
    "Diverged",
    "Evaluate",
    "Experiment",
    "Fenced",
    "Fleet",
    "OffbeatError",
    "Outage",
    "PeerError",
    "Refused",
    "Result",
    "Stop",
    "StorageError",
    "join",
    "replay",
    "resume",
    "run",
    "weights",
]


def __getattr__(name: str) -> Any:
    for module, names in _FROM.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'offbeat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
