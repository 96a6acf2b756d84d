"""offbeat: asynchronous optimisation on fleets of unequal workers.

>>> import offbeat
>>> result = offbeat.run("logistic:digits", "shuffled(lr=0.5)", "16 lognormal(1.0)",
...                      stop={"steps": 500})
>>> result.final["accuracy"] > 0.8
True
"""

from offbeat.runtime.api import Result, replay, resume, run
from offbeat.runtime.errors import ConfigError, Diverged, OffbeatError, StorageError
from offbeat.runtime.settings import Evaluate, Stop
from offbeat.workers.fleet import Fleet, Outage

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
    "replay",
    "resume",
    "run",
]
