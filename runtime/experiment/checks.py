"""Every refusal of what no part of an experiment can see alone: what is wrong, and a sentence.

Each function yields the sentences that hold, the first to be told first; ``refuse`` raises it.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from offbeat.algorithms.gossip import Gossip
from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.base.registry import MOST_SEEDS
from offbeat.runtime.experiment import metrics
from offbeat.runtime.experiment.engines import Virtual, Zmq
from offbeat.runtime.experiment.settings import BOUNDS, Evaluate
from offbeat.topologies import Topology
from offbeat.topologies.weights import TOLERANCE
from offbeat.workers.compressed import Compressed
from offbeat.workers.fleet import Fleet
from offbeat.workers.tasks import OWN_FILE
from offbeat.workers.work import OwnLoop

MOST_NODES = 200  # whose losses are recorded one by one
MODES = ("synchronous", "asynchronous")
REPLICAS = ("links", "global")

Sentences = Iterator[str]


def refuse(sentences: Iterable[str]) -> None:
    """Raise ConfigError with the first of ``sentences``, if there is one."""
    for sentence in sentences:
        raise ConfigError(sentence)


def of_experiment(e: Any) -> Sentences:
    """What is wrong with the experiment ``e``."""
    parts, workers = e.task.workers, e.fleet.workers
    any_shard = getattr(e.algorithm, "any_shard", None)  # gossip has none
    if parts < workers or (parts > workers and not any_shard):
        hint = "; for more shards than workers, take sample_shards = true"
        yield (
            f"the task is divided among {parts} workers, but the fleet has {workers}"
            + (hint if parts > workers and any_shard is False else "")
        )
    yield from of_clock(e)
    spec = getattr(e.task, "spec", None)
    served = isinstance(e.engine, Zmq) and not isinstance(e.algorithm, Gossip)
    if served and spec and spec.name == OWN_FILE and not isinstance(e.work, OwnLoop):
        yield (
            f'task "{OWN_FILE}": workers over ZeroMQ run no file that a server names; take '
            'work = "own-loop", and let your loops join with offbeat.join'
        )
    for metric in e.stop.targets:
        try:
            metrics.better(metric, metrics.own(e.task), BOUNDS)
        except ConfigError as error:
            yield f"stop.{metric}: {error}"
        if e.evaluate == Evaluate():
            yield f"stop.{metric}: the run never evaluates; give evaluate.steps or the like"
    if isinstance(e.seed, bool) or not isinstance(e.seed, int):
        yield f"seed must be a whole number, not {e.seed!r}"
    if not 0 <= e.seed < MOST_SEEDS:
        yield f"seed must be from 0 to {MOST_SEEDS - 1}, not {e.seed}"
    if isinstance(e.algorithm, Gossip):
        yield from of_gossip(e, e.algorithm)
    elif (e.topology, e.mode, e.replicas) != (None, None, "links"):
        yield "a method with a server has no topology, no mode and no replicas; remove them"
    elif e.fleet.loss:
        yield "fleet.loss is for gossip; a server's messages are not lost"
    if e.record.nodes and (e.topology is None or e.fleet.workers > MOST_NODES):
        yield f"record.nodes is for gossip on at most {MOST_NODES} nodes; remove it"


def of_clock(e: Any) -> Sentences:
    """What is wrong with its clock, pace and speeds."""
    clocks, measured = e.engine.clocks, e.fleet.law().measured
    if e.clock is not None and e.clock not in clocks:
        yield (
            f'clock must be {" or ".join(clocks)} with engine = "{e.engine.spec}", not "{e.clock}"'
        )
    if isinstance(e.pace, bool) or not isinstance(e.pace, int | float):
        yield f"pace must be a number, not {e.pace!r}"
    if not 0 < e.pace < math.inf:
        yield f"pace must be positive and finite, not {e.pace}"
    if measured and not e.real:
        yield (
            'fleet.speeds = "real" needs a real clock; take clock = "real" and '
            'engine = "ray" or "zmq", or a speed law such as "lognormal(1.0)"'
        )
    if measured and e.fleet.stragglers:
        yield "fleet.stragglers: nothing is emulated where speeds are real"


def called(method: Gossip) -> str:
    """The name of a method."""
    return method.spec.name if method.spec else type(method).__name__


def of_gossip(e: Any, method: Gossip) -> Sentences:
    """What is wrong with a gossip run."""
    name = called(method)
    if e.topology is None:
        yield f'{name} is a gossip method: give a topology, as topology = "ring"'
    if isinstance(e.work, Compressed):
        yield (
            f"{name}: gossip compresses what it sends by the method's own compressor; give "
            "the work that is compressed alone"
        )
    if not isinstance(e.engine, Virtual) and e.work.keep(1, e.task.initial(e.seed)):
        yield (
            f'{name}: with engine = "{e.engine.spec}" a gossip node keeps nothing between '
            "rounds; give its work fresh = true"
        )
    if method.points > 1 and isinstance(e.work, OwnLoop):
        yield (
            f"{name} wants gradients at {method.points} points on one sample, and a training "
            "loop makes its steps from one; take motef"
        )
    if e.mode not in (None, *MODES):
        yield f'mode must be one of {", ".join(MODES)}, not "{e.mode}"'
    if e.replicas not in REPLICAS:
        yield f"replicas must be one of {', '.join(REPLICAS)}"
    if e.mode == "synchronous" and not method.synchronous:
        yield f"{name} is asynchronous by its nature; leave mode out"
    yield from of_links(e.topology, e.fleet, method, e.asynchronous)
    method.suits(e.task.dim)


def dropping(fleet: Fleet) -> bool:
    """Whether gossip nodes lose rounds while they are away."""
    return fleet.on_outage != "pause" and bool(fleet.outages)


def of_links(topology: Topology, fleet: Fleet, method: Gossip, asynchronous: bool) -> Sentences:
    """What ``method`` cannot bear of a graph, of lost messages, and of nodes that are away."""
    name, n = called(method), fleet.workers
    if topology.n != n:
        yield f"the topology has {topology.n} nodes, but the fleet has {n} workers"
    if fleet.on_outage == "reassign":
        yield (
            'on_outage = "reassign" is for methods with a server; a gossip node can "pause", '
            'or "lose" the rounds it is away'
        )
    gone = [outage.worker for outage in fleet.outages if outage.to_s is None]
    if gone and not asynchronous and not dropping(fleet):
        yield (
            f"worker {gone[0]} pauses for ever, and in a synchronous run its neighbours would "
            'wait for it: give its outage an end, or take on_outage = "lose"'
        )
    if asynchronous and not method.asynchronous:
        yield (
            f"{name} needs nodes that do equally many rounds; run it synchronously, or take "
            "dsgd, ad-psgd, dsgt, choco, beer or motef"
        )
    if asynchronous and topology.directed and not method.pushes:
        yield (
            f"{name} exchanges both ways when asynchronous, and this graph is directed; take "
            "an undirected one, or gradient-push"
        )
    if asynchronous and method.pushes and topology.matrix(0).diagonal().min() <= 0:
        yield (
            f"{name} needs nodes that keep a share of what they have when asynchronous, and "
            "here the diagonal of the weights is not positive; take lazy weights"
        )
    troubles = [(fleet.loss, "messages are lost"), (dropping(fleet), "nodes sit rounds out")]
    trouble = next((said for there, said in troubles if there), "")
    if not method.varying and (trouble or topology.period != 1):
        yield (
            f"{name} is right only while the weights do not change, and here "
            f"{trouble or 'the graph does'}; take dsgd, dsgt, choco, beer or motef"
        )
    if trouble and topology.directed and not method.pushes:
        yield (
            f"{name} would lose the nodes' mean where {trouble} on a directed graph: its links "
            "cannot be paired; take an undirected graph, or gradient-push"
        )
    if topology.directed and not method.varying:
        yield (
            f"{name} may diverge where weights are not symmetric, and this graph is directed; "
            "take an undirected one, or dsgd, dsgt or gradient-push"
        )
    columns, rows = (np.abs(topology.matrix(0).sum(axis=axis) - 1).max() for axis in (0, 1))
    if not method.pushes and rows > TOLERANCE:
        yield f"{name} needs weights whose rows sum to 1; these suit gradient-push only"
    if columns > TOLERANCE:
        yield (
            f"{name} needs weights whose columns sum to 1: with these the sum over the nodes "
            "would not be kept"
        )


def of_live_nodes(e: Any) -> Sentences:
    """What only virtual time can do in gossip."""
    if dropping(e.fleet):
        yield (
            'on_outage = "lose" is for virtual time: here nodes are away when they are; '
            'take "pause"'
        )
    if e.replicas == "global":
        yield 'replicas = "global" is for virtual time; take "links"'


def of_peers(e: Any) -> Sentences:
    """What peers cannot run by themselves."""
    if not isinstance(e.algorithm, Gossip):
        yield "a method with a server has no peers; see offbeat serve"
    if unseen := [*e.stop.targets, *(["gradients"] if e.stop.gradients is not None else [])]:
        yield (
            "peers stop after steps (rounds), seconds or wall_s: none of them sees the others' "
            f"models; remove stop.{' and stop.'.join(unseen)}, or let offbeat run watch them"
        )
