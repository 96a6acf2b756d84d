"""A server and workers on a simulated network: the production hub and spokes, and one seed.

Every message is packed, travels as bytes, and may be dropped, doubled, delayed, overtaken or
stopped at a partition; processes are killed, frozen and restarted, the server too, from its last
checkpoint.  The faults are data: ``python tests/runtime/net/simnet.py SEED`` prints and repeats
them.
"""

import copy
import heapq
import random
import sys
from typing import NamedTuple

import numpy as np

from offbeat.algorithms.compression import COMPRESSORS
from offbeat.runtime.compute.backend import Back, Failed, Gone, JobRequest, JobResult
from offbeat.runtime.experiment.engines import Liveness
from offbeat.runtime.protocol import wire
from offbeat.runtime.protocol.channel import MOST_QUEUED, WINDOW
from offbeat.runtime.protocol.messages import kinds
from offbeat.runtime.protocol.server import SERVER, ServerProtocol
from offbeat.runtime.protocol.worker import WorkerProtocol
from offbeat.workers.compressed import SENT

D = 6
X0 = np.zeros(D)
TOP = COMPRESSORS.parse("topk(2)")
STEP_S = 0.1  # how often a process looks at the clock
MOST_EVENTS = 200_000
PIECE_BYTES, INLINE_BYTES = wire.PIECE_BYTES, wire.INLINE_BYTES
CALM_S = 90.0  # seconds within which a run is done once the last fault is over


class Fault(NamedTuple):
    """What happens, when, to whom, for how long."""

    at_s: float
    kind: str
    node: str
    for_s: float


def gradient(x, shard, draw, memory):
    """What a job makes of a model, with the same bits wherever it is computed."""
    return 0.25 * x + np.sin(1.0 + shard + 10.0 * draw + np.arange(D)) + 0.125 * memory


def difference(x, shard, draw, sent):
    """The compressed difference of that to what was sent."""
    return TOP.compress(gradient(x, shard, draw, 0.0) - sent)


class Run:
    """The server's application: applies what arrives, hands out what comes next, keeps a log."""

    def __init__(self, n, target, kept):
        self.n, self.target, self.name = n, target, kept
        self.x, self.step, self.serial = X0.copy(), 0, 0
        self.draws = [0] * n
        self.sent = {}  # serial -> order
        self.kept = {}  # worker -> memory
        self.unaware = set(range(n))
        self.applied = []  # (order, payload)
        self.cancelled = set()

    def begin(self, hub, now_s):
        for worker in range(self.n):
            self.assign(worker, hub, now_s)

    def assign(self, worker, hub, now_s):
        x = self.x.copy()
        x.flags.writeable = False
        order = JobRequest(self.serial, worker, worker, self.draws[worker], 1, self.step, x, None)
        self.serial += 1
        self.draws[worker] += 1
        self.submit(order, hub, now_s)

    def submit(self, order, hub, now_s):
        if order.worker in self.unaware:
            memory = self.kept.get(order.worker, np.zeros((1, D)))
            order = order._replace(kept={self.name: memory})
            self.unaware.discard(order.worker)
        self.sent[order.serial] = order
        hub.submit(order, now_s)

    def hear(self, event, hub, now_s, g):
        if isinstance(event, JobResult):
            order = self.sent.pop(event.serial, None)
            if order is None:
                return
            assert np.isfinite(event.loss)
            memory = self.kept.get(order.worker, np.zeros((1, D)))
            update = event.payload
            if self.name == SENT:  # nothing comes back but what was sent
                assert not event.kept
                self.kept[order.worker] = memory + update
                update = self.kept[order.worker][0]
            else:
                self.kept[order.worker] = event.kept["memory"].copy()
            self.applied.append((order._replace(kept=memory), event.payload.copy()))
            self.x = self.x - 0.125 * update
            self.step += 1
            if self.step < self.target:
                self.assign(order.worker, hub, now_s)
        elif isinstance(event, Failed):
            order = self.sent.get(event.serial)
            if order is not None:
                self.unaware.add(order.worker)
                self.submit(order, hub, now_s)
        elif isinstance(event, Gone):
            self.unaware.add(event.worker)
        elif isinstance(event, Back):
            self.unaware.add(event.worker)
            mine = [o for s, o in sorted(self.sent.items()) if o.worker == event.worker]
            for order in mine:
                if g.random() < 0.2:  # given up, as by a method that cancels
                    del self.sent[order.serial]
                    hub.cancel(order.serial, now_s)
                    self.cancelled.add(order.serial)
                    self.assign(order.worker, hub, now_s)
                else:
                    self.submit(order, hub, now_s)


class Process:
    """A worker: computes one order at a time."""

    def __init__(self, world, node):
        world.nonces += 1
        self.nonce = world.nonces
        self.node, self.address = node, f"{node}/{self.nonce}".encode()
        self.spoke = WorkerProtocol(node, self.nonce, "1", "here", world.local_s(node))
        self.busy = None
        self.memory = {}  # by worker


class World:
    """One simulated run.

    Args:
        seed: of everything.
    """

    def __init__(self, seed):
        g = self.g = random.Random(seed)
        self.now_s, self.events, self.count, self.nonces = 0.0, [], 0, 0
        self.n = g.randint(1, 4)
        self.drop, self.double = g.choice([0, 0, 0.02, 0.2]), g.choice([0, 0.05, 0.5])
        self.jitter_s = g.choice([0.001, 0.02, 0.2])
        self.raises, self.spoils = g.choice([0, 0, 0.02]), g.choice([0, 0, 0.01])
        self.compute_s = g.choice([0.01, 0.3, 2.0])
        wire.PIECE_BYTES = g.choice([20, PIECE_BYTES])  # half of the runs have large models
        self.nodes = [f"w{i}" for i in range(self.n + g.randint(0, 1))]
        # Half of the runs have compressed updates, half of them arrays in frames of their own.
        self.name = random.Random(seed + 0.5).choice(["memory", SENT])
        wire.INLINE_BYTES = random.Random(seed + 0.25).choice([0, INLINE_BYTES])
        self.kinds = kinds(X0, {self.name: np.zeros((1, D))})
        self.faults = self.plan()
        self.offsets = {node: g.uniform(0, 1e5) for node in [SERVER, *self.nodes]}
        self.blocked = set()  # (from, to)
        self.frozen = {}  # node -> until
        self.links = {}  # id of a link -> what it had acknowledged
        self.happened = dict.fromkeys(("drop", "double", "kill", "server", "freeze", "cut"), 0)
        self.run, self.saved = Run(self.n, g.randint(20, 60), self.name), None
        self.incarnations = {}
        self.hub = None
        self.processes = {}
        self.seen = set()  # incarnations of members
        self.totals = {}  # of hubs that are no more

    def plan(self):
        g, faults, at_s = self.g, [], 1.0
        for _ in range(g.randint(0, 6)):
            at_s += g.expovariate(0.5)
            kind = g.choice(["kill", "kill", "server", "freeze", "cut", "deaf", "mute", "clog"])
            node = SERVER if kind == "server" else g.choice(self.nodes)
            if kind == "freeze" and g.random() < 0.3:
                node = SERVER
            faults.append(Fault(at_s, kind, node, g.choice([0.3, 1.2, 4.0, 10.0])))
        return faults

    # -- The machinery ---------------------------------------------------------------------------

    def local_s(self, node):
        return self.now_s + self.offsets[node]

    def at(self, delay_s, node, call, *args):
        self.count += 1
        heapq.heappush(self.events, (self.now_s + delay_s, self.count, node, call, args))

    def go(self):
        """Events until the run is at its target."""
        self.boot_server()
        for node in self.nodes:
            self.at(self.g.random(), node, self.boot, node)
        for fault in self.faults:
            self.at(fault.at_s, None, self.strike, fault)
        end_s = max([f.at_s + f.for_s for f in self.faults], default=0.0) + CALM_S
        pieces = 16 if wire.PIECE_BYTES == PIECE_BYTES else 80
        end_s += self.run.target * (4 * self.compute_s + 20 * self.jitter_s + pieces * self.drop)
        handled = 0
        while self.run.step < self.run.target:
            handled += 1
            assert handled < MOST_EVENTS, "events without end"
            self.now_s, _, node, call, args = heapq.heappop(self.events)
            assert self.now_s < end_s, f"{self.run.step} of {self.run.target} by {end_s:.0f} s"
            if node in self.frozen:
                self.at(self.frozen[node] - self.now_s, node, call, *args)
                continue
            call(*args)
            self.check()
        self.check_replay()
        return self

    def boot_server(self):
        incarnation = self.incarnations[SERVER] = self.incarnations.get(SERVER, 0) + 1
        self.hub = ServerProtocol(
            "run", "text", self.kinds, self.n, incarnation, Liveness(1.0), "1"
        )
        if self.saved is not None:
            self.run = copy.deepcopy(self.saved)
        self.run.unaware = set(range(self.n))
        if not self.run.serial:
            self.run.begin(self.hub, self.local_s(SERVER))
        self.at(0, SERVER, self.server_tick, incarnation)
        self.save(incarnation)

    def save(self, incarnation):
        if incarnation != self.hub.incarnation:
            return
        self.saved = copy.deepcopy(self.run)
        self.at(1.5, SERVER, self.save, incarnation)

    def boot(self, node):
        self.processes[node] = process = Process(self, node)
        self.at(0, node, self.worker_tick, process)

    def server_tick(self, incarnation):
        if incarnation != self.hub.incarnation:
            return
        self.hub.tick(self.local_s(SERVER))
        self.serve()
        self.at(STEP_S, SERVER, self.server_tick, incarnation)

    def worker_tick(self, process):
        if self.processes.get(process.node) is not process:
            return
        process.spoke.tick(self.local_s(process.node))
        self.work(process)
        self.at(STEP_S, process.node, self.worker_tick, process)

    # -- What processes do -----------------------------------------------------------------------

    def serve(self):
        """The server's application hears what happened, and its post leaves."""
        hub = self.hub
        while hub.events:
            events, hub.events = hub.events, []
            for event in events:
                self.run.hear(event, hub, self.local_s(SERVER), self.g)
        for address, frames in hub.outbox:
            self.send(SERVER, address.decode().split("/")[0], frames, address)
        hub.outbox.clear()
        assert not hub.cuts, hub.notes

    def work(self, process):
        spoke, now_s = process.spoke, self.local_s(process.node)
        if spoke.fate is not None:
            raise AssertionError(spoke.fate)
        if spoke.welcome is not None:
            process.memory = {}
            spoke.ready(self.kinds, now_s)
        if spoke.state != "working":
            process.memory = {}
        if process.busy is None and (order := spoke.take()) is not None:
            if order.kept is not None:
                process.memory[order.shard] = order.kept[self.name]
            process.busy = order, process.memory[order.shard]
            self.at(self.g.expovariate(1 / self.compute_s), process.node, self.computed, process)
        for frames in spoke.outbox:
            self.send(process.node, SERVER, frames, process.address)
        spoke.outbox.clear()

    def computed(self, process):
        if self.processes.get(process.node) is not process:
            return
        (order, memory), process.busy = process.busy, None
        spoke, now_s = process.spoke, self.local_s(process.node)
        if self.g.random() < self.raises:
            spoke.failed(order, "the test's own", now_s)
        else:
            if self.name == SENT:
                message = difference(order.x, order.shard, order.draw, memory[0])
                (payload,), kept, told = message.encode(), memory + message.dense(), {}
            else:
                payload = gradient(order.x, order.shard, order.draw, memory[0])
                kept = (memory + payload) / 2
                told = {"memory": kept}
            if process.memory.get(order.shard) is memory:
                process.memory[order.shard] = kept
            if self.spoils and self.g.random() < self.spoils:
                self.garble(process)
            spoke.answer(order, JobResult(order.serial, 1.0, payload, told, 0.1), now_s)
        self.work(process)

    def garble(self, process):
        """Bytes that mean nothing, sent by someone who is not part of the run."""
        before = self.run.x.tobytes()
        hub, now_s = self.hub, self.local_s(SERVER)
        hub.receive(b"nobody", None, [self.g.randbytes(self.g.randint(0, 40))], now_s)
        answered = [post for post in hub.outbox if post[0] == b"nobody"]
        assert len(hub.cuts) + len(answered) == 1
        hub.cuts.clear()
        hub.outbox = [post for post in hub.outbox if post[0] != b"nobody"]
        assert self.run.x.tobytes() == before

    # -- The network -----------------------------------------------------------------------------

    def send(self, src, dst, frames, address):
        g = self.g
        if g.random() < self.drop:
            self.happened["drop"] += 1
            return
        copies = 1
        if g.random() < self.double:
            self.happened["double"] += 1
            copies = 2
        whole = [bytes(frame) for frame in frames]
        for _ in range(copies):
            delay_s = 0.0005 + g.expovariate(1 / self.jitter_s)
            self.at(delay_s, dst, self.deliver, src, dst, whole, address)

    def deliver(self, src, dst, frames, address):
        if (src, dst) in self.blocked:
            self.happened["drop"] += 1
            return
        if dst == SERVER:
            self.hub.receive(address, None, frames, self.local_s(SERVER))
            self.serve()
            return
        process = self.processes.get(dst)
        if process is not None and process.address == address:
            process.spoke.receive(frames, self.local_s(dst))
            self.work(process)

    # -- Faults ----------------------------------------------------------------------------------

    def strike(self, fault):
        kind, node = fault.kind, fault.node
        if kind == "kill":
            self.happened["kill"] += self.processes.pop(node, None) is not None
            self.at(fault.for_s, None, self.boot, node)
        elif kind == "server":
            self.happened["server"] += 1
            self.boot_server()
        elif kind == "freeze":
            self.happened["freeze"] += 1
            self.frozen[node] = max(self.now_s + fault.for_s, self.frozen.get(node, 0.0))
            self.at(fault.for_s, None, self.thaw, node)
        else:  # "clog" of some links; released in any order, since each has its own length
            self.happened["cut"] += 1
            both = {(node, SERVER), (SERVER, node)}
            ways = {"deaf": {(SERVER, node)}, "mute": {(node, SERVER)}}.get(kind, both)
            self.blocked |= ways
            length_s = fault.for_s * (self.g.random() if kind == "clog" else 1)
            self.at(length_s, None, self.heal, ways)

    def thaw(self, node):
        if self.frozen.get(node, np.inf) <= self.now_s + 1e-9:
            del self.frozen[node]

    def heal(self, ways):
        self.blocked -= ways

    # -- Invariants ------------------------------------------------------------------------------

    def check(self):
        hub, run, jobs = self.hub, self.run, self.hub.jobs
        # I1: every job is accepted, taken back or out; every order is applied, given up or out.
        assert jobs.assigned == jobs.counts["accepted"] + jobs.counts["taken back"] + len(
            jobs.outstanding
        )
        assert run.serial == len(run.applied) + len(run.sent) + len(run.cancelled)
        # I2: the number in the system is the concurrency.
        assert len(jobs.outstanding) <= len(run.sent) <= self.n
        # I5: the model is finite.
        assert np.isfinite(run.x).all()
        ends = [(s.link, s.member.node) for s in hub.seats.values()]
        ends += [(p.spoke._link, p.node) for p in self.processes.values()]
        for link, _ in ends:
            # I6: what a link passed on only grows.
            assert link.acknowledged >= self.links.get(id(link), (0, None))[0]
            self.links[id(link)] = link.acknowledged, link
            # I7: nothing grows without limit.
            assert len(link._flight) <= WINDOW
            assert link.held <= WINDOW
            assert len(link._queue) <= MOST_QUEUED
        for seat in hub.seats.values():
            known = self.incarnations.get((hub.incarnation, seat.member.node), 0)
            assert seat.member.incarnation >= known
            self.incarnations[hub.incarnation, seat.member.node] = seat.member.incarnation
        for process in self.processes.values():
            assert len(process.spoke.orders) <= self.n

    def check_replay(self):
        """I8: the applied updates, computed again without faults, make the same model."""
        serials = [order.serial for order, _ in self.run.applied]
        assert len(set(serials)) == len(serials)  # nothing was applied twice
        x, sent = X0.copy(), {}
        for order, payload in self.run.applied:
            job = order.x, order.shard, order.draw, order.kept[0]
            if self.name == SENT:
                again = difference(*job).dense()
                update = sent[order.worker] = sent.get(order.worker, 0.0) + again
            else:
                again = update = gradient(*job)
            np.testing.assert_array_equal(again, payload)
            x = x - 0.125 * update
        np.testing.assert_array_equal(x, self.run.x)


def simulate(seed):
    """One run; where it fails, the command that repeats it is told."""
    world = World(seed)
    try:
        return world.go()
    except Exception as error:
        raise AssertionError(
            f"seed {seed} fails; repeat it with\n"
            f"    python tests/runtime/net/simnet.py {seed}\nafter {world.faults}"
        ) from error
    finally:
        wire.PIECE_BYTES, wire.INLINE_BYTES = PIECE_BYTES, INLINE_BYTES


if __name__ == "__main__":
    done = simulate(int(sys.argv[1]))
    print(*done.faults, sep="\n")
    print(done.happened, f"{done.now_s:.1f} s", done.hub.counts)
