"""Asynchronous gossip under a virtual clock: every node at its own pace, nobody waits.

A node computes its gradient, tells it, and then exchanges with neighbours over the links between
them, one at a time.  An exchange over {i, j} of weight w moves

    delta = w (h_ji - h_ij)        to i, and -delta to j,

whatever either is doing: what a node gets while it computes waits for its next ``mix``, and counts
at once in what it says to others.  So the sum over all nodes (and what is under way) is kept, of
models and of tracked gradients alike, at any speeds; AD-PSGD is the case of one neighbour and
w = 1/2.  Both ends keep what went over a compressed link, in either direction.  Each link is used
from both ends: per round there is twice the mixing, and twice the messages, of a synchronous run.

An exchange takes a message there and one back; meanwhile the link is busy, and a node that would
use it again goes on without.  Where either message is lost, neither end changes.  Methods that push
send running totals instead, and need no answer; what they cannot send they keep.  A node's link
sends one message after the other.

How old what a node gets is, is counted on each link: exchanges in a row that found the other's
value unchanged (0: new every time).
"""

import math
from collections.abc import Iterable
from heapq import heappop, heappush
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offbeat.algorithms.compression.contract import HEADER
from offbeat.algorithms.gossip import Gossip, Points
from offbeat.runtime.base import trees
from offbeat.runtime.base.errors import ConfigError, Diverged
from offbeat.runtime.base.randomness import rng
from offbeat.runtime.gossip.loop import GossipLoop, measure
from offbeat.runtime.gossip.stacked import NOTHING
from offbeat.runtime.node.channels import LocalView
from offbeat.runtime.run.records import ROWS_HELD, Records
from offbeat.runtime.server.virtual import ALONE_BYTES, STACK_BYTES
from offbeat.topologies import Topology
from offbeat.workers.fleet import Fleet, Timing
from offbeat.workers.speeds import away
from offbeat.workers.tasks.contract import Task
from offbeat.workers.work import Work

MOST_EDGES = 10_000  # links up to which each one's ages are told
DONE, OFFER, ANSWER, SHARES, LEFT, AGAIN = range(6)  # kinds of events

PairEvent = tuple[float, int, int, int, tuple[Any, ...]]  # time, order, kind, node, what


class Channels:
    """One node's values on all channels, and what it got on each since it last mixed."""

    def __init__(self, names: Iterable[str]) -> None:
        self.value: dict[str, NDArray] = {}
        self.size: dict[str, int] = {}  # bytes of a value's message, where links keep nothing
        self.got: dict[str, Any] = dict.fromkeys(names, NOTHING)
        # Compressed differences: what went over each link, to and from a neighbour.
        self.out: dict[str, dict[int, NDArray]] = {name: {} for name in names}
        self.back: dict[str, dict[int, NDArray]] = {name: {} for name in names}


class PairNode:
    """What a method sees as ``Node``: vectors ``[d]``."""

    def __init__(self, x: NDArray, channels: Channels, say: Any) -> None:
        self.x = x
        self._channels, self._say = channels, say

    def __getattr__(self, field: str) -> Any:
        raise AttributeError(f"the node has no {field} yet")

    def mix(self, channel: str) -> NDArray:
        got, self._channels.got[channel] = self._channels.got[channel], NOTHING
        return got

    def publish(self, channel: str, value: NDArray) -> NDArray:
        said, size = self._say(channel, value)
        self._channels.value[channel], self._channels.size[channel] = said, size
        return said

    def average(self, channel: str) -> NDArray:
        return self._channels.value[channel] + self.mix(channel)

    pushed, push = mix, publish

    def fields(self) -> dict[str, Any]:
        """The method's state."""
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}


class Pairs(GossipLoop):
    """One asynchronous run of a gossip method.

    Args:
        task, method, topology, fleet, timing, records: the parts.
        seed: of the run.
        initial: ``[n, d]``, where the nodes start; None: all at the task's initial point.
        work: what takes a gradient's place.
        around: see ``Loop``.

    Raises:
        ConfigError: the method, or the graph, needs rounds.
    """

    def __init__(
        self,
        task: Task,
        method: Gossip,
        topology: Topology,
        fleet: Fleet,
        timing: Timing,
        records: Records,
        *,
        seed: int,
        initial: NDArray | None = None,
        work: Work | None = None,
        **around: Any,
    ) -> None:
        super().__init__(
            task,
            method,
            topology,
            fleet,
            timing,
            records,
            seed=seed,
            work=work,
            asynchronous=True,
            **around,
        )
        self.seed = seed
        x = np.broadcast_to(task.initial(seed) if initial is None else initial, (self.n, task.dim))
        self.channels = [Channels(method.channels) for _ in range(self.n)]
        self.nodes = [
            PairNode(x[i].copy(), channels, self._sayer(i))
            for i, channels in enumerate(self.channels)
        ]
        self.kept = self.work.keep(self.n, x[0])  # by the nodes, between rounds
        self._apart = initial is not None
        self.now_s = 0.0
        self.told = 0  # gradients, of all nodes
        self.order = 0  # of events
        self.heap: list[PairEvent] = []
        self.jobs: dict[int, dict[str, Any]] = {}  # node -> what it computes
        self.begun = [False] * self.n  # whether its first gradient, if it needs one, is told
        self.rounds = [0] * self.n
        self.numbers = [0] * self.n  # of the next job
        self.count = 0  # of exchanges and messages tried
        self.link_s = [0.0] * self.n  # until when what it sends keeps its link busy
        self.busy: dict[int, float] = {}  # link i n + j (i < j in exchanges) -> until when
        self.seen: dict[int, int] = {}  # link i n + j -> round of j that i met last
        # Link -> exchanges, sum of ages, largest age, the age now.
        self.ages: dict[int, list[int]] = {}
        dropping = self.network.dropping
        self._windows, self._pauses = (fleet.windows(), {}) if dropping else ({}, fleet.windows())

    @property
    def step(self) -> int:
        """Rounds done: gradients told a node, on average."""
        return self.told // self.n

    @property
    def time_s(self) -> float:
        """Virtual seconds so far."""
        return self.now_s

    @property
    def x(self) -> NDArray:
        """The nodes' mean ``[d]``."""
        return self._models().mean(axis=0)

    def facts(self) -> dict[str, Any]:
        told = super().facts()
        if len(self.ages) <= MOST_EDGES:
            told["edges"] = [
                [*divmod(link, self.n), count, total / count, most]
                for link, (count, total, most, _) in sorted(self.ages.items())
            ]
        return told

    # -- Nodes ---------------------------------------------------------------------------------

    def _start(self) -> None:
        first = [self.method.init(node) for node in self.nodes]
        self.begun = [wanted is None for wanted in first]
        for i, wanted in enumerate(first):
            if wanted is None:
                if self._apart or self.method.pushes:
                    self._exchange(i)
                wanted = self.method.ask(self.nodes[i])
            self._begin(i, wanted)

    def _advance(self) -> bool:
        if not self.heap:
            return False
        self.now_s, _, kind, i, what = heappop(self.heap)
        does = self._done, self._offered, self._answered, self._shared, self._left, self._begin
        does[kind](i, *what)
        return True

    def _later(self, time_s: float, kind: int, node: int, *what: Any) -> None:
        if time_s < math.inf:
            heappush(self.heap, (time_s, self.order, kind, node, what))
            self.order += 1

    def _begin(self, i: int, points: Points) -> None:
        """Node ``i`` sets out to compute a gradient."""
        number = self.numbers[i]
        self.numbers[i] += 1
        self.jobs[i] = {
            "points": points if isinstance(points, tuple) else (points,),
            "number": number,
            "start_s": self.now_s,
            "read": self.told,
            "found": None,
            "kept": {},
        }
        end_s = self.timing.clock.finish(i, number, self.now_s, self.work.steps)
        for from_s, to_s in self._windows.get(i, []):
            if from_s < end_s and self.now_s < to_s:
                self._later(max(from_s, self.now_s), LEFT, i, to_s)
                return
        self._later(end_s, DONE, i)

    def _left(self, i: int, to_s: float) -> None:
        """Node ``i`` goes away: it loses its work, and begins anew when it is back."""
        job = self.jobs.pop(i)
        event = {"time_s": self.now_s, "worker": i, "event": "lost", "jobs": [job["number"]]}
        self.records.events.append(event)
        self._later(to_s, AGAIN, i, job["points"])

    def _done(self, i: int) -> None:
        """Node ``i`` has its gradient."""
        job, node = self.jobs[i], self.nodes[i]
        if job["found"] is None:
            self._compute(job)
        for name, row in job["kept"].items():
            self.kept[name][i] = row
        gradient = job["found"] if len(job["found"]) > 1 else job["found"][0]
        row = self.now_s, i, job["number"], job["read"], self.told, job["start_s"], self.now_s
        self.records.rows.append(row)
        if len(self.records.rows) >= ROWS_HELD:
            self.records.flush()
        self.told += 1
        try:
            if self.begun[i]:
                self.method.tell(node, gradient)
            else:
                self.method.begin(node, gradient)
                self.begun[i] = True
            self.rounds[i] += 1
            self._exchange(i)
            self._begin(i, self.method.ask(node))
        except ConfigError:
            if np.isfinite(node.x).all():
                raise
            raise Diverged(
                f"the model of node {i} is not finite at {self.now_s:.6g} s; take a smaller step "
                "size"
            ) from None

    def _compute(self, due: dict[str, Any]) -> None:
        """Compute every gradient that is missing, or only the one due where models are large."""
        size = due["points"][0].nbytes
        jobs = [due]
        if size < ALONE_BYTES:
            missing = [job for job in self.jobs.values() if job["found"] is None and job is not due]
            jobs += [job for job in missing if len(job["points"]) == len(due["points"])]
            jobs = jobs[: max(1, STACK_BYTES // size)]
        nodes = {id(job): i for i, job in self.jobs.items()}
        worker = np.array([nodes[id(job)] for job in jobs])
        draw = np.array([job["number"] for job in jobs]) * self.work.steps
        steps = np.full(len(jobs), self.work.steps)
        found, kept = [], {name: held[worker] for name, held in self.kept.items()}
        points = tuple(map(np.stack, zip(*(job["points"] for job in jobs), strict=True)))
        for losses, gradients in self._answers(points, worker, draw, steps, kept):
            good = np.isfinite(losses) & np.isfinite(gradients).all(axis=1)
            if not good.all():
                raise Diverged(
                    f"the gradient or loss of node {worker[good.argmin()]} is not finite at "
                    f"{self.now_s:.6g} s; take a smaller step size"
                )
            found.append(gradients)
        for job, *mine in zip(jobs, *found, strict=True):
            job["found"] = tuple(mine)
        for at, job in enumerate(jobs):
            job["kept"] = {name: rows[at] for name, rows in kept.items()}

    # -- Exchanges -----------------------------------------------------------------------------

    def _exchange(self, i: int) -> None:
        """Node ``i`` turns to its neighbours."""
        links = LocalView(self.network.whole(self.rounds[i]), i)
        if self.method.pushes:
            self._share(i, links)
            return
        weights = links.takes
        if self.method.partners == "one" and weights:
            generator = rng(self.seed, "partner", i, self.rounds[i])
            chances = np.abs(list(weights.values()))
            j = generator.choice(list(weights), p=chances / chances.sum())
            weights = {int(j): 0.5}
        for j, weight in weights.items():
            link = min(i, j) * self.n + max(i, j)
            if not self._away(j) and self.busy.get(link, -math.inf) <= self.now_s:
                self._offer(i, j, weight, link)

    def _away(self, i: int) -> bool:
        return any(begin <= self.now_s < end for begin, end in self._windows.get(i, []))

    def _offer(self, i: int, j: int, weight: float, link: int) -> None:
        said, size = self._speak(i, j)
        self._met(i, j)
        delay_s = self._sent(i, size)
        arrives = self.network.arrives(self.count, i, j) and self.network.arrives(self.count, j, i)
        if not arrives:  # paired: both ways, or neither
            self.messages_lost += 1
            self.busy[link] = self.now_s + 2 * delay_s
        elif delay_s:
            self.busy[link] = math.inf
            self._later(self.now_s + delay_s, OFFER, j, i, weight, said)
        else:
            self._offered(j, i, weight, said)

    def _offered(self, j: int, i: int, weight: float, said: dict[str, NDArray]) -> None:
        """What ``i`` has ``said`` has come to ``j``, which moves, and answers."""
        link = min(i, j) * self.n + max(i, j)
        self.busy[link] = self.now_s
        if self._away(j):
            self.messages_lost += 1
            return
        answer, size = self._speak(j, i)
        delay_s = self._sent(j, size)
        moved = {}
        for name in said.keys() & answer.keys():
            theirs, mine = (
                self._heard(i, j, name, said[name]),
                self._heard(j, i, name, answer[name]),
            )
            moved[name] = weight * (mine - theirs)
            self.channels[j].got[name] = self.channels[j].got[name] - moved[name]
        if delay_s:
            self.busy[link] = math.inf
            self._later(self.now_s + delay_s, ANSWER, i, j, moved)
        else:
            self._answered(i, j, moved)

    def _answered(self, i: int, j: int, moved: dict[str, NDArray]) -> None:
        """``j`` has moved, and node ``i`` moves the other way."""
        self.busy[min(i, j) * self.n + max(i, j)] = self.now_s
        for name, delta in moved.items():
            self.channels[i].got[name] = self.channels[i].got[name] + delta

    def _speak(self, i: int, j: int) -> tuple[dict[str, NDArray], int]:
        """What ``i`` sends ``j`` on each channel, as it is read, and its bytes."""
        mine, said, size = self.channels[i], {}, 0
        for name, channel in self.method.channels.items():
            if name not in mine.value:
                continue
            level = mine.value[name] + channel.gain * mine.got[name]
            if self.method.exact:
                said[name], bytes_ = level, mine.size[name]
            elif channel.memory:
                h = mine.out[name].get(j)
                said[name], bytes_ = self._squeeze(name, level if h is None else level - h, i, j)
            elif isinstance(mine.got[name], float):  # nothing
                said[name], bytes_ = mine.value[name], mine.size[name]
            else:  # with what it got it is no longer what a message can hold
                said[name], bytes_ = self._squeeze(name, level, i, j)
            size += bytes_
        return said, size

    def _heard(self, i: int, j: int, name: str, said: NDArray) -> NDArray:
        """What ``j`` knows of ``i`` after it has ``said`` this; both ends keep it."""
        if self.method.exact or not self.method.channels[name].memory:
            return said
        old = self.channels[i].out[name].get(j)
        h = said if old is None else old + said
        self.channels[i].out[name][j] = self.channels[j].back[name][i] = h
        return h

    def _met(self, i: int, j: int) -> None:
        """Count how old what ``i`` meets at ``j`` is."""
        link = i * self.n + j
        ages = self.ages.setdefault(link, [0, 0, 0, 0])
        age = ages[3] + 1 if self.seen.get(link) == self.rounds[j] else 0
        self.seen[link] = self.rounds[j]
        self.ages[link] = [ages[0] + 1, ages[1] + age, max(ages[2], age), age]

    def _share(self, i: int, links: LocalView) -> None:
        """Node ``i`` keeps its share of all it has and sends the others."""
        mine, free, own = self.channels[i], {}, links.own
        for j, share in links.shares.items():
            if self.busy.get(i * self.n + j, -math.inf) <= self.now_s:
                free[j] = share
            else:  # kept: else all that a node has would soon be under way
                own += share
        size = sum(mine.size.values())
        totals: dict[int, dict[str, NDArray]] = {j: {} for j in free}
        for name, value in mine.value.items():
            mine.got[name] = mine.got[name] + own * value
            for j, share in free.items():
                given = share * value + mine.out[name].get(j, 0.0)
                totals[j][name] = mine.out[name][j] = given
        for j, total in totals.items():
            delay_s = self._sent(i, size)
            self.busy[i * self.n + j] = self.now_s + delay_s
            if self._away(j) or not self.network.arrives(self.count, i, j):
                self.messages_lost += 1
            elif delay_s:
                self._later(self.now_s + delay_s, SHARES, j, i, self.rounds[i], total)
            else:
                self._shared(j, i, self.rounds[i], total)

    def _shared(self, j: int, i: int, number: int, total: dict[str, NDArray]) -> None:
        """Running totals of node ``i`` have come to ``j``."""
        mine, link = self.channels[j], j * self.n + i
        count, ages, most, _ = self.ages.get(link, [0, 0, 0, 0])
        age = number - 1 - self.seen.get(link, number - 1)  # messages that never came
        self.ages[link] = [count + 1, ages + age, max(most, age), age]
        self.seen[link] = number
        for name, given in total.items():
            mine.got[name] = mine.got[name] + given - mine.back[name].get(i, 0.0)
            mine.back[name][i] = given

    def _sent(self, i: int, size: int) -> float:
        """Count a message; answers how long it takes."""
        self.count += 1
        self.messages += 1
        self.bytes += size
        fleet = self.fleet
        delay_s = fleet.latency_s
        if fleet.bandwidth:  # one message after the other
            self.link_s[i] = max(self.link_s[i], self.now_s) + size / fleet.bandwidth
            delay_s += self.link_s[i] - self.now_s
        if fleet.jitter_s:
            delay_s += rng(self.seed, "message jitter", i, self.count).exponential(fleet.jitter_s)
        return delay_s

    # -- Compression ---------------------------------------------------------------------------

    def _squeeze(self, name: str, x: NDArray, *address: int) -> tuple[NDArray, int]:
        """What the receiver of ``x [d]`` reads, and its bytes."""
        compressor = self.method.compressor
        generator = None
        if compressor.draws:
            at = address[0] * self.n + address[1]
            generator = rng(self.seed, f"compress {name}", at, self.count)
        message = compressor.compress(x, generator)
        return message.dense(), message.nbytes

    def _sayer(self, i: int) -> Any:
        """What node ``i`` says when it publishes: the value, or the compressed value."""

        def say(name: str, value: NDArray) -> tuple[NDArray, int]:
            if self.method.exact or self.method.channels[name].memory:
                return value, HEADER + value.nbytes
            return self._squeeze(name, value, i, i)

        return say

    # -- Records -------------------------------------------------------------------------------

    def _models(self) -> NDArray:
        return np.stack([self.method.models(node) for node in self.nodes])

    def _measured(self) -> dict[str, float]:
        self.records.flush()
        row = {"time_s": self.now_s, "step": self.step, "gradients": self.gradients}
        row |= measure(self._models(), self._evaluated, self.records.nodes)
        row["bytes"], row["bytes_edge"] = self.bytes, self.bytes / max(self.messages, 1)
        row |= self.records.staleness()
        counts = np.array(list(self.ages.values())).reshape(-1, 4)
        row["edge_age_mean"] = float(counts[:, 1].sum() / max(counts[:, 0].sum(), 1))
        row["edge_age_max"] = int(counts[:, 2].max(initial=0))
        computing = sum(
            self.now_s - job["start_s"] - away(self._pauses.get(i, []), job["start_s"], self.now_s)
            for i, job in self.jobs.items()
        )
        busy_s = float(self.records.busy_s.sum()) + computing
        row["busy"] = busy_s / (self.n * self.now_s) if self.now_s else 0.0
        return row

    def _sound(self) -> bool:
        return all(np.isfinite(node.x).all() for node in self.nodes)

    _STATE = (
        *("now_s", "told", "bytes", "messages", "messages_lost", "order", "heap", "jobs", "begun"),
        *("kept", "rounds", "numbers", "count", "link_s", "busy", "seen", "ages", "channels"),
        *("_next_step", "_next_s", "_next_gradients"),
    )

    def state(self) -> dict[str, Any]:
        return {
            "x": self.x,
            "gradients": self.gradients,
            "step": self.step,
            "nodes": [trees.dump(node.fields()) for node in self.nodes],
            "state": {key: trees.dump(getattr(self, key)) for key in self._STATE},
            "records": self.records.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._started = True
        for key, tree in state["state"].items():
            setattr(self, key, trees.load(getattr(self, key), tree))
        for node, fields in zip(self.nodes, state["nodes"], strict=True):
            for key, value in trees.load(None, fields).items():
                setattr(node, key, value)
        self.records.restore(state["records"])
