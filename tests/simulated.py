"""Gossip nodes under a network that delays, reorders, doubles and drops, and under faults.

Everything comes from one seed: the same seed, the same bits.
"""

import copy
import heapq
import itertools
from collections import Counter
from dataclasses import replace

import numpy as np

from offbeat.runtime.experiment.experiment import Experiment
from offbeat.runtime.experiment.settings import Evaluate, Stop
from offbeat.runtime.node.asynchronous import IDLE
from offbeat.runtime.node.channels import Copies, Public
from offbeat.runtime.node.effects import Compute, RoundDone, Send
from offbeat.runtime.node.make import gossip_node
from offbeat.runtime.node.node import OPEN
from offbeat.topologies import TOPOLOGIES
from offbeat.workers.fleet import Fleet

MOST_EVENTS = 200_000  # of one run: beyond, it hangs
AGAIN_S = 20.0  # between repetitions of what may not have arrived
NOTICED_S = 5.0  # within which a fault is noticed, and its end


def experiment(task, method, topology="ring", loss=0.0, mode=None, seed=0):
    made = TOPOLOGIES.parse(topology, n=task.workers) if isinstance(topology, str) else topology
    return Experiment(
        task=task, algorithm=method, topology=made, fleet=Fleet(workers=task.workers, loss=loss),
        mode=mode, stop=Stop(steps=1), evaluate=Evaluate(steps=1), seed=seed,
    )  # fmt: skip


class Simulation:
    """All nodes of an experiment.

    Args:
        experiment: whose.
        seed: of everything that happens.
        limit: rounds each node does.
        drop, double: probabilities, of each message.
        check: called with this and a node, after every event at that node.
        start: ``[n, d]``, where the nodes begin, if not at one point.
    """

    def __init__(self, experiment, seed, limit, drop=0.0, double=0.0, check=None, start=None):
        self.experiment, self.limit, self.start = experiment, limit, start
        self.rng = np.random.default_rng(seed)
        self.drop, self.double, self.check = drop, double, check
        self.now, self.order, self.heap = 0.0, itertools.count(), []
        self.n = experiment.task.workers
        self.cut = set()  # links that carry nothing
        self.epoch = Counter()  # of each link: what is noticed is of the newest
        self.counts = Counter()
        self.nodes = {i: self._made(i, 0, False) for i in range(self.n)}
        self.dead = {}
        for i, node in self.nodes.items():
            self._do(i, node.start())
            self.later(AGAIN_S, self._again, i)

    def _made(self, i, incarnation, joining):
        experiment = self.experiment
        if self.start is not None:
            task = copy.copy(experiment.task)
            task.initial = lambda seed: self.start[i]
            experiment = replace(experiment, task=task)
        node = gossip_node(experiment, i, incarnation=incarnation, joining=joining)
        node.limit = self.limit
        return node

    # -- Events --------------------------------------------------------------------------------

    def later(self, seconds, do, *what):
        heapq.heappush(self.heap, (self.now + seconds, next(self.order), do, what))

    def run(self, until_s=np.inf):
        while self.heap and self.heap[0][0] <= until_s and not self.settled:
            self.now, _, do, what = heapq.heappop(self.heap)
            do(*what)
            self.counts["events"] += 1
            assert self.counts["events"] < MOST_EVENTS, "it hangs"
        return self

    @property
    def settled(self):
        """Whether all is done and nothing under way that matters.

        While a link is not open at both ends, one may have given back what the other has not.
        """
        if self.dead or self.cut or not all(node.quiet for node in self.nodes.values()):
            return False
        return all(is_open(one, j) for i, one in self.nodes.items() for j in self.nodes if j != i)

    def _do(self, i, effects):
        node = self.nodes[i]
        for effect in effects:
            if isinstance(effect, Send):
                self._carry(i, node.incarnation, effect)
            elif isinstance(effect, Compute):
                self.later(self.rng.exponential(), self._compute, i, node, effect)
            else:
                assert isinstance(effect, RoundDone)
        if self.check is not None:
            self.check(self, i)

    def _carry(self, i, incarnation, send):
        copies = 1 + (self.rng.random() < self.double)
        self.counts["doubled"] += copies - 1
        for _ in range(copies):
            if self.rng.random() < self.drop or frozenset((i, send.to)) in self.cut:
                self.counts["lost"] += 1
            else:
                delay_s = self.rng.exponential() * (20 if self.rng.random() < 0.05 else 1)
                self.later(delay_s, self._arrive, i, incarnation, send)

    def _arrive(self, i, incarnation, send):
        if send.to in self.nodes and frozenset((i, send.to)) not in self.cut:
            node = self.nodes[send.to]
            items = [x.copy() if isinstance(x, np.ndarray) else x for x in send.items]
            self._do(send.to, node.receive(i, send.kind, send.number, items, incarnation))

    def _compute(self, i, node, job):
        if self.nodes.get(i) is node:
            self._do(i, node.computed(job.number, *node.answer(job)))

    def _again(self, i):
        if i in self.nodes:
            self._do(i, self.nodes[i].again())
        self.later(AGAIN_S, self._again, i)

    # -- Faults --------------------------------------------------------------------------------

    def _notice(self, i, j, epoch, what):
        """A node is told of its neighbour, unless that is no longer so."""
        if i in self.nodes and self.epoch[frozenset((i, j))] == epoch:
            self._do(i, getattr(self.nodes[i], what)(j))

    def tell(self, i, j, what):
        """Both ends notice, each in its time."""
        link = frozenset((i, j))
        self.epoch[link] += 1
        for one, other in ((i, j), (j, i)):
            delay_s = self.rng.uniform(0.1, NOTICED_S)
            self.later(delay_s, self._notice, one, other, self.epoch[link], what)

    def kill(self, i):
        if len(self.nodes) > 1 and i in self.nodes:
            self.dead[i] = self.nodes.pop(i)
            self.counts["killed"] += 1
            for j in range(self.n):
                if j != i:
                    self.tell(i, j, "down")

    def restart(self, i):
        if i in self.dead:
            old = self.dead.pop(i)
            self.nodes[i] = self._made(i, old.incarnation + 1, True)
            self.counts["restarted"] += 1
            self._do(i, self.nodes[i].start())
            for j in range(self.n):
                if j != i and frozenset((i, j)) not in self.cut and j in self.nodes:
                    self.tell(i, j, "up")

    def part(self, i, j):
        self.cut.add(frozenset((i, j)))
        self.counts["parted"] += 1
        self.tell(i, j, "down")

    def heal(self, i, j):
        if frozenset((i, j)) in self.cut:
            self.cut.discard(frozenset((i, j)))
            if i in self.nodes and j in self.nodes:
                self.tell(i, j, "up")

    def faults(self, count, until_s):
        """Kills and cuts at random times, each of which ends."""
        for _ in range(count):
            at, lasts = self.rng.uniform(0, until_s), self.rng.exponential(until_s / 10)
            i, j = (int(k) for k in self.rng.choice(self.n, 2, replace=False))
            does, undoes, who = (
                (self.kill, self.restart, (i,))
                if self.rng.random() < 0.5
                else (self.part, self.heal, (i, j))
            )
            self.later(at, does, *who)
            self.later(at + lasts, undoes, *who)

    @property
    def x(self):
        return np.stack([self.nodes[i].model for i in range(self.n)])


def is_open(node, j):
    return (node.links[j].state is OPEN) if j in node.links else not node.newcomer


def copies_agree(simulation, i):
    """At equal rounds, every copy is its owner's vector, bit for bit."""
    node = simulation.nodes[i]
    for j, link in node.links.items():
        other = simulation.nodes.get(j)
        if other is None or node.joining or other.joining:
            continue
        back = other.links.get(i)
        if link.state is not OPEN or back is None or back.state is not OPEN:
            continue
        last, theirs_last = (n.round - (n.now is None or not n.full) for n in (node, other))
        if last != theirs_last or (link.theirs, link.mine) != (back.mine, back.theirs):
            continue
        if last < link.since or link.anew or back.anew:
            continue
        for mine, theirs in zip(node.node._ends.values(), other.node._ends.values(), strict=True):
            if isinstance(mine, Public) and i in other._view(last).takes:
                if mine.q is None and theirs.q is None and mine.h is not None:
                    assert np.array_equal(theirs.copies.get(i, theirs.first), mine.h)
                    simulation.counts["copies compared"] += 1
            elif isinstance(mine, Copies) and j in mine.out:
                assert np.array_equal(mine.out[j], theirs.back[i])
                simulation.counts["copies compared"] += 1


def sums_are_kept(simulation, i):
    """What a node tracks is what it put in and what it took; rows of weights sum to 1."""
    method, node = simulation.experiment.algorithm, simulation.nodes[i]
    if node.joining or not node.begun:
        return
    now = node.now
    if now is not None and not method.pushes:
        assert abs(now.own + sum(now.takes.values()) - 1) < 1e-12
    if now is None and "v" in method.channels:
        end, gain = node.node._ends["v"], method.channels["v"].gain
        taken = sum(end.flow.values()) - end.owed
        np.testing.assert_allclose(node.node.v, put_in(node) + gain * taken, rtol=0, atol=1e-9)
        simulation.counts["sums compared"] += 1


def ends_agree(simulation, i):
    """Where nothing is under way, both ends of a link know the same, and took the same."""
    node = simulation.nodes[i]
    for j, at in node.exchanges.items():
        other = simulation.nodes.get(j)
        back = other and other.exchanges.get(i)
        if node.joining or not back or other.joining:
            continue
        mine, theirs = node.links[j], other.links[i]
        if mine.state is not OPEN or theirs.state is not OPEN:
            continue
        if (mine.mine, mine.theirs) != (theirs.theirs, theirs.mine):
            continue
        if node.method.pushes:
            if at.phase is not IDLE or other.seen.get(i) != at.number - 1 or mine.mine:
                continue  # nothing is known of what was under way when a link closed
            tables = [(node.node._out, other.node._back)]
        elif at.phase is not IDLE or back.phase is not IDLE or at.number != back.number:
            continue
        else:
            tables = [
                (node.node._out, other.node._back),
                (node.node._back, other.node._out),
                (node.flow, {n: {i: -v for i, v in f.items()} for n, f in other.flow.items()}),
            ]
        for mine, theirs in tables:
            for name in mine:
                assert np.array_equal(mine[name].get(j, 0.0), theirs[name].get(i, 0.0))
                simulation.counts["ends compared"] += 1


def moves_are_kept(simulation, i):
    """What a node tracks, and has got, is what it put in and what it took."""
    method, node = simulation.experiment.algorithm, simulation.nodes[i]
    if node.joining or not node.begun or "v" not in method.channels:
        return
    gain = method.channels["v"].gain
    has = node.node.v + gain * node.node._got.get("v", 0.0)
    taken = gain * sum(node.flow["v"].values())
    np.testing.assert_allclose(has, put_in(node) + taken, rtol=0, atol=1e-9)
    simulation.counts["sums compared"] += 1


def put_in(node):
    """What a node's tracked variable follows: its momentum, or its last gradient."""
    fields = node.node.fields()
    return fields["m"] if "m" in fields else fields["u"]
