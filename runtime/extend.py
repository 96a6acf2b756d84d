"""What to build extensions with: methods, tasks, compressors, topologies, engines of one's own.

>>> from offbeat.extend import ALGORITHMS, Algorithm, Positive
>>> class Mine(Algorithm):
...     def __init__(self, lr):
...         self.lr = lr
...     def start(self, server):
...         for worker in range(server.n):
...             server.assign(worker)
...     def arrive(self, server, update):
...         server.apply(self.lr * update.payload)
...         server.assign(update.worker)
>>> @ALGORITHMS.register("mine")
... def mine(lr: Positive = 0.1) -> Mine:
...     '''Pure asynchronous SGD, in ten lines.'''
...     return Mine(lr)
>>> import offbeat
>>> offbeat.run("quadratic(5)", "mine(lr=0.05)", "10 1..10", stop={"steps": 50}).reason
'steps'
"""

from offbeat.algorithms.compression.contract import COMPRESSORS, Compressor, Message
from offbeat.algorithms.gossip.contract import Channel, Gossip
from offbeat.algorithms.server import ALGORITHMS, Algorithm, Server, Update
from offbeat.runtime.base.randomness import Streams, rng
from offbeat.runtime.base.registry import (
    Count,
    File,
    Finite,
    Fraction,
    Natural,
    NonNegative,
    Positive,
    Reads,
    Registry,
    Seed,
    Share,
    Spec,
)
from offbeat.runtime.compute.backend import ComputeBackend, JobRequest, JobResult
from offbeat.runtime.experiment.engines import ENGINES, Engine
from offbeat.topologies.contract import TOPOLOGIES, Topology
from offbeat.workers.speeds import SPEEDS, Clock, Law
from offbeat.workers.tasks.contract import TASKS, Task
from offbeat.workers.work import INNERS, WORK, Inner, Work

__all__ = [
    "ALGORITHMS",
    "COMPRESSORS",
    "ENGINES",
    "INNERS",
    "SPEEDS",
    "TASKS",
    "TOPOLOGIES",
    "WORK",
    "Algorithm",
    "Channel",
    "Clock",
    "Compressor",
    "ComputeBackend",
    "Count",
    "Engine",
    "File",
    "Finite",
    "Fraction",
    "Gossip",
    "Inner",
    "JobRequest",
    "JobResult",
    "Law",
    "Message",
    "Natural",
    "NonNegative",
    "Positive",
    "Reads",
    "Registry",
    "Seed",
    "Server",
    "Share",
    "Spec",
    "Streams",
    "Task",
    "Topology",
    "Update",
    "Work",
    "rng",
]
