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
    from offbeat.runtime.api import Result, replay, resume, run
    from offbeat.runtime.errors import ConfigError, Diverged, OffbeatError, StorageError
    from offbeat.runtime.own.run import join, weights
    from offbeat.runtime.settings import Evaluate, Stop
    from offbeat.workers.fleet import Fleet, Outage

# Imported when asked for: a process that only computes loads no more than it needs.
_FROM = {
    "offbeat.runtime.api": ("Result", "replay", "resume", "run"),
    "offbeat.runtime.errors": ("ConfigError", "Diverged", "OffbeatError", "StorageError"),
    "offbeat.runtime.own.run": ("join", "weights"),
    "offbeat.runtime.settings": ("Evaluate", "Stop"),
    "offbeat.workers.fleet": ("Fleet", "Outage"),
}

__all__ = [
    "ConfigError",
    "Diverged",
    "Evaluate",
    "Fleet",
    "OffbeatError",
    "Outage",
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
