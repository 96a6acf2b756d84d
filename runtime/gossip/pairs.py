"""Asynchronous gossip under a virtual clock: the live nodes, and a heap of what happens to them.

The nodes are those of ``runtime.node.asynchronous``.  Gradients that are missing are computed
together, when the first of them is due.  Messages take as long as the fleet's links say; at no
latency, they come after everything else of their instant, as they would at the smallest.  What
comes to a node that is away waits for its return.

How old what a node gets is, is counted on each link: exchanges in a row that found the other's
value unchanged (0: new every time).
"""

import math
from collections import Counter
from heapq import heappop, heappush
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offbeat.algorithms.gossip import Gossip
from offbeat.runtime.base import trees
from offbeat.runtime.base.errors import ConfigError, Diverged
from offbeat.runtime.compute.backend import ALONE_BYTES
from offbeat.runtime.gossip.loop import COUNTS, GossipLoop, measure
from offbeat.runtime.node.asynchronous import ANSWER, OFFER, SHARES, PairingNode
from offbeat.runtime.node.channels import Spoken
from offbeat.runtime.node.effects import Compute, Effect, Send
from offbeat.runtime.node.network import Uplink
from offbeat.runtime.node.node import Setting
from offbeat.runtime.run.records import ROWS_HELD, Records
from offbeat.runtime.server.virtual import STACK_BYTES
from offbeat.topologies import Topology
from offbeat.workers.fleet import Fleet, Timing
from offbeat.workers.speeds import away
from offbeat.workers.tasks.contract import Task
from offbeat.workers.work import Work

MOST_EDGES = 10_000  # links up to which each one's ages are told

PairEvent = tuple[float, int, str, int, tuple[Any, ...]]  # time, order, kind, node, arguments


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
        parts = task, method, topology, fleet, timing, records
        super().__init__(*parts, seed=seed, work=work, asynchronous=True, **around)
        setting = Setting(task, self.work, self.method, self.network, seed, closes=False)
        self.nodes = [PairingNode(setting, i) for i in range(self.n)]
        self.uplinks = [Uplink(fleet, seed, i) for i in range(self.n)]
        self._initial = initial
        self.kept = self.work.keep(self.n, setting.start)  # by the nodes, between rounds
        self.now_s = 0.0
        self.gradients_done = 0  # of all nodes
        self.order = 0  # of events
        self.heap: list[PairEvent] = []
        self.jobs: dict[int, dict[str, Any]] = {}  # node -> what it computes
        self.undelivered = 0  # messages to nodes that are away for ever
        self.seen: dict[int, int] = {}  # link i n + j -> round of j that i met last
        # Link -> exchanges, sum of ages, largest age, the age now.
        self.ages: dict[int, list[int]] = {}
        dropping = self.network.dropping
        self._windows, self._pauses = (fleet.windows(), {}) if dropping else ({}, fleet.windows())

    @property
    def step(self) -> int:
        """Rounds done: gradients told a node, on average."""
        return self.gradients_done // self.n

    @property
    def gradients(self) -> int:
        return self.gradients_done * self.work.steps

    @property
    def time_s(self) -> float:
        return self.now_s

    @property
    def x(self) -> NDArray:
        """The nodes' mean ``[d]``."""
        return self._models().mean(axis=0)

    def counts(self) -> dict[str, int]:
        total = sum((node.counts for node in self.nodes), Counter())
        total["messages_lost"] += self.undelivered
        return {key: total[key] for key in COUNTS}

    def facts(self) -> dict[str, Any]:
        facts = super().facts()
        if len(self.ages) <= MOST_EDGES:
            facts["edges"] = [
                [*divmod(link, self.n), count, total / count, most]
                for link, (count, total, most, _) in sorted(self.ages.items())
            ]
        return facts

    # -- Events --------------------------------------------------------------------------------

    def _start(self) -> None:
        for i, node in enumerate(self.nodes):
            self._do(i, node.start(None if self._initial is None else self._initial[i].copy()))

    def _advance(self) -> bool:
        if not self.heap:
            return False
        self.now_s, _, kind, i, arguments = heappop(self.heap)
        try:
            if kind == "mail":
                self._mail(i, *arguments)
            elif kind == "done":
                self._done(i)
            elif kind == "left":
                self._left(i, *arguments)
            else:
                self._do(i, self.nodes[i].repeat())
        except ConfigError:
            if np.isfinite(self.nodes[i].node.x).all():
                raise
            raise Diverged(
                f"the model of node {i} is not finite at {self.now_s:.6g} s; take a smaller step "
                "size"
            ) from None
        return True

    def _later(self, time_s: float, kind: str, node: int, *arguments: Any) -> None:
        if time_s < math.inf:
            heappush(self.heap, (time_s, self.order, kind, node, arguments))
            self.order += 1

    def _do(self, i: int, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                uplink, to = self.uplinks[i], effect.to
                delay_s = uplink.delay_s(self.now_s, to, effect.nbytes, uplink.serial(to))
                message = effect.kind, effect.number, effect.weight or 0.0, effect.spoken
                self._later(self.now_s + delay_s, "mail", to, i, *message, self.nodes[i].round)
            else:
                assert isinstance(effect, Compute)
                self._begin(i, effect)

    def _begin(self, i: int, job: Compute) -> None:
        """Node ``i`` sets out to compute a gradient."""
        self.jobs[i] = {
            "points": job.points,
            "number": job.number,
            "start_s": self.now_s,
            "read": self.gradients_done,
            "gradients": None,
            "kept": {},
        }
        end_s = self.timing.clock.finish(i, job.number, self.now_s, self.work.steps)
        for from_s, to_s in self._windows.get(i, []):
            if from_s < end_s and self.now_s < to_s:
                self._later(max(from_s, self.now_s), "left", i, to_s)
                return
        self._later(end_s, "done", i)

    def _left(self, i: int, to_s: float) -> None:
        """Node ``i`` goes away: it loses its work, and begins anew when it is back."""
        number = self.jobs.pop(i)["number"]
        event = {"time_s": self.now_s, "worker": i, "event": "lost", "jobs": [number]}
        self.records.events.append(event)
        self._later(to_s, "back", i)

    def _done(self, i: int) -> None:
        """Node ``i`` has its gradient."""
        job = self.jobs[i]
        if job["gradients"] is None:
            self._compute(job)
        for name, row in job["kept"].items():
            self.kept[name][i] = row
        now_s, done = self.now_s, self.gradients_done
        self.records.rows.append(
            (now_s, i, job["number"], job["read"], done, job["start_s"], now_s)
        )
        if len(self.records.rows) >= ROWS_HELD:
            self.records.flush()
        self.gradients_done += 1
        self._do(i, self.nodes[i].accept(job["gradients"]))

    def _mail(
        self, i: int, j: int, kind: str, number: int, weight: float, spoken: Spoken, round_: int
    ) -> None:
        """A message of ``j``, sent in its round, comes to ``i``."""
        for from_s, to_s in self._windows.get(i, []):
            if from_s <= self.now_s < to_s:
                self.undelivered += to_s == math.inf
                self._later(to_s, "mail", i, j, kind, number, weight, spoken, round_)
                return
        effects = self.nodes[i].hear(j, kind, number, weight, spoken)
        if effects and kind in (OFFER, ANSWER, SHARES):
            self._met(i, j, round_, missed=kind == SHARES)
        self._do(i, effects)

    def _met(self, i: int, j: int, round_: int, *, missed: bool) -> None:
        """Count how old what ``i`` gets of ``j`` is; of shares, how many it ``missed``."""
        link = i * self.n + j
        count, total, most, age = self.ages.get(link, (0, 0, 0, 0))
        if missed:
            age = round_ - 1 - self.seen.get(link, round_ - 1)
        else:
            age = age + 1 if self.seen.get(link) == round_ else 0
        self.seen[link] = round_
        self.ages[link] = [count + 1, total + age, max(most, age), age]

    # -- Gradients -----------------------------------------------------------------------------

    def _compute(self, due: dict[str, Any]) -> None:
        """Compute every gradient that is missing, or only the one due where models are large."""
        size = due["points"][0].nbytes
        jobs = {i: job for i, job in self.jobs.items() if job is due}
        if size < ALONE_BYTES:
            missing = {
                i: job
                for i, job in self.jobs.items()
                if job["gradients"] is None and len(job["points"]) == len(due["points"])
            }
            most = max(1, STACK_BYTES // size)
            jobs = dict([*jobs.items(), *missing.items()][:most])
        worker = np.array(list(jobs))
        draw = np.array([job["number"] for job in jobs.values()]) * self.work.steps
        steps = np.full(len(jobs), self.work.steps)
        found, kept = [], {name: held[worker] for name, held in self.kept.items()}
        points = tuple(map(np.stack, zip(*(job["points"] for job in jobs.values()), strict=True)))
        for losses, gradients in self._answers(points, worker, draw, steps, kept):
            good = np.isfinite(losses) & np.isfinite(gradients).all(axis=1)
            if not good.all():
                raise Diverged(
                    f"the gradient or loss of node {worker[good.argmin()]} is not finite at "
                    f"{self.now_s:.6g} s; take a smaller step size"
                )
            found.append(gradients)
        for row, (job, *gradients) in enumerate(zip(jobs.values(), *found, strict=True)):
            job["gradients"] = tuple(gradients)
            job["kept"] = {name: rows[row] for name, rows in kept.items()}

    # -- Records -------------------------------------------------------------------------------

    def _models(self) -> NDArray:
        return np.stack([node.model for node in self.nodes])

    def _measured(self) -> dict[str, float]:
        self.records.flush()
        row = {"time_s": self.now_s, "step": self.step, "gradients": self.gradients}
        row |= measure(self._models(), self._evaluated, self.records.nodes)
        counts = self.counts()
        row["bytes"] = counts["bytes"]
        row["bytes_edge"] = counts["bytes"] / max(counts["messages"], 1)
        row |= self.records.staleness()
        ages = np.array(list(self.ages.values())).reshape(-1, 4)
        row["edge_age_mean"] = float(ages[:, 1].sum() / max(ages[:, 0].sum(), 1))
        row["edge_age_max"] = int(ages[:, 2].max(initial=0))
        computing = sum(
            self.now_s - job["start_s"] - away(self._pauses.get(i, []), job["start_s"], self.now_s)
            for i, job in self.jobs.items()
        )
        busy_s = float(self.records.busy_s.sum()) + computing
        row["busy"] = busy_s / (self.n * self.now_s) if self.now_s else 0.0
        return row

    def _sound(self) -> bool:
        return all(np.isfinite(node.node.x).all() for node in self.nodes)

    _STATE = (
        *("now_s", "gradients_done", "undelivered", "order", "heap", "jobs", "kept", "seen"),
        *("ages", "_next_step", "_next_s", "_next_gradients"),
    )

    def state(self) -> dict[str, Any]:
        return {
            "x": self.x,
            "gradients": self.gradients,
            "step": self.step,
            "nodes": [node.state() for node in self.nodes],
            "uplinks": [uplink.state() for uplink in self.uplinks],
            "state": {key: trees.dump(getattr(self, key)) for key in self._STATE},
            "records": self.records.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._started = True
        for key, tree in state["state"].items():
            setattr(self, key, trees.load(getattr(self, key), tree))
        for node, saved in zip(self.nodes, state["nodes"], strict=True):
            node.restore(saved)
        for uplink, saved in zip(self.uplinks, state["uplinks"], strict=True):
            uplink.restore(saved)
        self.records.restore(state["records"])
