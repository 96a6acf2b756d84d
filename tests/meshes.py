"""Peers, each a mesh and its node, under a network that delays, doubles, reorders and drops.

Everything comes from one seed: the same seed, the same bits.
"""

import heapq
import itertools
from collections import Counter

import numpy as np
from simulated import experiment

from offbeat.runtime.experiment.engines import Liveness
from offbeat.runtime.gossip.hosted import Envelope
from offbeat.runtime.node.effects import Compute, Send
from offbeat.runtime.node.make import gossip_node
from offbeat.runtime.protocol import messages as say
from offbeat.runtime.protocol import peer as mesh
from offbeat.runtime.protocol.peer import PeerProtocol

MOST_EVENTS = 400_000  # of one run: beyond, it hangs
LIVENESS = Liveness(4.0)
AGAIN_S = 20.0  # without a new round, before a node repeats what may not have arrived
COMPUTE_S = 1.0


class Party:
    """One process: a mesh, and its node once it has begun."""

    def __init__(self, net, i, incarnation, state):
        self.net, self.i, self.state = net, i, state
        e = net.experiment
        born = gossip_node(e, i)
        self.mesh = PeerProtocol(
            net.runs[i], net.texts[i], i, net.names, sorted(born.neighbours), net.kinds, LIVENESS,
            incarnation=incarnation, nonce=int(net.rng.integers(1, mesh.PROCESS)),
            saved=state is not None, joins=born.bears, now_s=net.now,
        )  # fmt: skip
        self.node, self.serial, self.moved_s = None, itertools.count(), net.now

    def turn(self):
        """What a process does over and over."""
        net, m = self.net, self.mesh
        m.tick(net.now)
        if self.node is None and (how := m.decide(net.now)) is not None:
            self._begin(how)
        if self.node is not None:
            while m.events or m.mail:
                events, m.events = m.events, []
                for what, j in events:
                    self._do(getattr(self.node, what)(j))
                mail, m.mail = m.mail, []
                for p in mail:
                    self._do(self.node.receive(p.frm, p.kind, p.number, p.items, p.incarnation))
            if net.now - self.moved_s > AGAIN_S:
                self.moved_s = net.now
                self._do(self.node.again(), again=True)
            m.round = self.node.round
            if m.standing == say.RUNNING and self.node.quiet:
                m.leave(say.DONE, net.now)
        posts, m.outbox = m.outbox, []
        for to, _, frames in posts:
            net.carry(self.i, to, [bytes(memoryview(f).cast("B")) for f in frames])

    def _begin(self, how):
        m, net = self.mesh, self.net
        net.counts[how] += 1
        if how == mesh.OVER:
            return
        node = self.node = gossip_node(
            net.experiment, self.i, incarnation=m.incarnation, joining=how == mesh.JOIN
        )
        up = m.begin(how, net.now)
        node.limit = 0 if how == mesh.RESTORE else net.limit
        self._do(node.restore(self.state) if how == mesh.RESTORE else node.start())
        if how != mesh.JOIN:
            for j in up:
                node.meet(j, mesh.incarnation(m.neighbours[j].theirs))
        if how == mesh.RESTORE:
            for j in m.neighbours:
                self._do(node.down(j))
                node.forget(j)
            for j in up:
                self._do(node.up(j))
            self._do(node.extend(net.limit))

    def computed(self, node, job):
        if self.node is node:
            self.moved_s = self.net.now
            self._do(node.computed(job.number, *node.answer(job)))

    def _do(self, effects, again=False):
        for e in effects:
            if isinstance(e, Send):
                parcel = Envelope(
                    e.to,
                    self.i,
                    self.node.incarnation,
                    next(self.serial),
                    e.kind,
                    e.number,
                    e.items,
                    again,
                )
                self.mesh.send(parcel, self.net.now)
            elif isinstance(e, Compute):
                delay_s = COMPUTE_S * self.net.rng.exponential()
                self.net.later(delay_s, self.net.compute, self.i, self, self.node, e)


class Net:
    """All peers of an experiment, from ``seed``; ``drop`` and ``double`` are probabilities."""

    def __init__(self, task, method, topology, seed, limit, drop=0.0, double=0.0, texts=None):
        self.experiment = experiment(task, method, topology)
        self.n, self.limit, self.drop, self.double = task.workers, limit, drop, double
        self.rng = np.random.default_rng(seed)
        self.names = [f"n{i}" for i in range(self.n)]
        self.texts, self.runs = texts or ["text"] * self.n, ["run"] * self.n
        self.kinds = say.spoken(task.initial(0))
        self.now, self.order, self.heap = 0.0, itertools.count(), []
        self.counts, self.cut, self.frozen = Counter(), set(), set()
        self.incarnations = Counter()
        self.parties = {}
        for i in range(self.n):
            self.later(self.rng.exponential(), self.start, i)

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
        return len(self.parties) == self.n and all(
            p.mesh.standing == say.DONE and p.mesh.finished(self.now) for p in self.parties.values()
        )

    def start(self, i, state=None):
        if i not in self.parties:
            self.incarnations[i] += 1
            self.parties[i] = Party(self, i, self.incarnations[i], state)
            self._tick(i, self.parties[i])

    def _tick(self, i, party):
        if self.parties.get(i) is party:
            if i not in self.frozen:
                party.turn()
            self.later(LIVENESS.tick_s, self._tick, i, party)

    def compute(self, i, party, node, job):
        if i in self.frozen:
            self.later(1.0, self.compute, i, party, node, job)
        elif self.parties.get(i) is party:
            party.computed(node, job)
            party.turn()

    def carry(self, i, to, frames):
        copies = 1 + (self.rng.random() < self.double)
        self.counts["doubled"] += copies - 1
        for _ in range(copies):
            if self.rng.random() < self.drop or frozenset((i, to)) in self.cut:
                self.counts["lost"] += 1
            else:
                delay_s = self.rng.exponential(0.1) * (20 if self.rng.random() < 0.05 else 1)
                self.later(delay_s, self._arrive, i, to, frames)

    def _arrive(self, i, to, frames):
        if frozenset((i, to)) in self.cut:
            self.counts["lost"] += 1
        elif to in self.frozen:
            self.later(1.0, self._arrive, i, to, frames)
        elif to in self.parties:
            party = self.parties[to]
            party.mesh.receive(b"%d" % i, self.names[i], frames, self.now)
            party.turn()

    # -- Faults --------------------------------------------------------------------------------

    def kill(self, i):
        if i in self.parties and len(self.parties) > 1:
            del self.parties[i]
            self.counts["killed"] += 1

    def freeze(self, i):
        self.frozen.add(i)
        self.counts["frozen"] += 1

    def thaw(self, i):
        self.frozen.discard(i)

    def part(self, i, j):
        self.cut.add(frozenset((i, j)))
        self.counts["parted"] += 1

    def heal(self, i, j):
        self.cut.discard(frozenset((i, j)))

    def faults(self, count, until_s):
        """Kills, stops and cuts at random times, each of which ends."""
        for _ in range(count):
            at, lasts = self.rng.uniform(5, until_s), self.rng.exponential(until_s / 5)
            i, j = (int(k) for k in self.rng.choice(self.n, 2, replace=False))
            does, undoes, who = [
                (self.kill, self.start, (i,)),
                (self.freeze, self.thaw, (i,)),
                (self.part, self.heal, (i, j)),
            ][self.rng.integers(3)]
            self.later(at, does, *who)
            self.later(at + lasts, undoes, *who)

    @property
    def x(self):
        return np.stack([self.parties[i].node.model for i in range(self.n)])
