"""A gossip run under a real clock, watched by a driver that is in no message's way.

The driver collects the trace and the models that are to be evaluated, and has all nodes come to
rest for a checkpoint.  How it speaks to the processes that have the nodes, a subclass says.
"""

import math
import time
from abc import abstractmethod
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from logging import WARNING
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from offbeat.algorithms.gossip import Gossip
from offbeat.runtime.base.errors import ComputeError
from offbeat.runtime.base.logs import tell
from offbeat.runtime.experiment.experiment import Experiment
from offbeat.runtime.gossip.hosted import NodeReport
from offbeat.runtime.gossip.loop import COUNTS, measure
from offbeat.runtime.node.make import gossip_node
from offbeat.runtime.run.loop import Loop
from offbeat.runtime.run.records import ROWS_HELD, Records

LOOK_S = 0.1  # seconds after which a wait is interrupted for signals and checkpoints
SILENT_S = 600.0  # without a word of a process that is waited for
REMIND_S = 60.0  # between two sentences that say what is waited for


class Slot:
    """A process's place, and what is known of its nodes."""

    def __init__(self, nodes: list[int]) -> None:
        self.nodes = nodes
        self.replaced = 0
        self.limits = 0  # that were set since its process began
        self.told = NodeReport()  # the last one
        self.now_s = 0.0  # of its last report,
        self.heard_s = -math.inf  # which came then
        self.answers: dict[int, Any] = {}

    @property
    @abstractmethod
    def here(self) -> bool:
        """Whether its process is there."""


P = TypeVar("P", bound=Slot)


class GossipDriver(Loop, Generic[P]):
    """See the module.

    Args:
        experiment: what is run.
        seats: the places of the processes.
        records: where everything is written.
        seed: of the run.
        around: see ``Loop``.
    """

    def __init__(
        self,
        experiment: Experiment,
        seats: Sequence[P],
        records: Records,
        *,
        seed: int,
        **around: Any,
    ) -> None:
        super().__init__(experiment.task, records, **around)
        assert isinstance(experiment.algorithm, Gossip)
        self.experiment, self.method = experiment, experiment.algorithm
        self.n, self._seats = experiment.task.workers, seats
        self._bears = gossip_node(experiment, 0).bears
        self._limit = 0.0  # of rounds the nodes may begin
        self._rounds: dict[int, int] = {}  # of the nodes that are there
        self._counts: dict[tuple[int, int], dict[str, int]] = {}  # seat, replaced -> what it counts
        self._before: Counter[str] = Counter()  # counted before a resume
        self._rows: list[tuple[float, ...]] = []  # that may not be the oldest yet
        self._ends = array("d")  # when gradients were told, for the ages of asynchronous ones
        self._models: dict[int, dict[int, tuple[float, NDArray]]] = {}  # round -> node -> time, [d]
        self._told: Counter[int] = Counter()  # round -> jobs done in it; -1: in all before
        # A round that is complete: its number, time, jobs up to then, and models.
        self._shown: tuple[int, float, int, NDArray] | None = None
        self._last: tuple[float, NDArray] | None = None  # what was sampled last
        self._questions = self.restarts = 0
        self._zero_s = 0.0  # of the monotonic clock, when the run began
        self._frozen_s: float | None = None  # the time, while the nodes rest

    # -- The run -------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Rounds done: by all, or asynchronously gradients told a node."""
        if self._shown is not None:
            return self._shown[0]
        if self.experiment.asynchronous:
            return self.records.arrivals // self.n
        return min(self._rounds.values(), default=0)

    @property
    def time_s(self) -> float:
        """Real seconds so far, in those of the fleet."""
        if self._shown is not None:
            return self._shown[1]
        return self._clock_s() if self._frozen_s is None else self._frozen_s

    @property
    def gradients(self) -> int:
        """Gradients of all nodes: as many a job as it has local steps."""
        jobs = self.records.arrivals if self._shown is None else self._shown[2]
        return jobs * self.experiment.work.steps

    @property
    def x(self) -> NDArray:
        """The nodes' mean ``[d]``."""
        assert self._last is not None
        return self._last[1].mean(axis=0)

    def facts(self) -> dict[str, Any]:
        """See ``Loop``: counts of all nodes; how often actors were replaced, and links."""
        counts = self._totals()
        links = {f"links_{key}": counts[key] for key in ("closed", "opened")}
        told = {key: counts[key] for key in COUNTS}
        return {**told, "restarts": self.restarts, "joined": counts["joined"], **links}

    def _totals(self) -> Counter[str]:
        return sum(map(Counter, self._counts.values()), Counter(self._before))

    def _clock_s(self) -> float:
        return (time.monotonic() - self._zero_s) / self.experiment.pace

    def _start(self) -> None:
        self._launch(None, 0.0)

    def _loop(self) -> str:
        self._frozen_s = None
        self._go()
        while True:
            self._listen(LOOK_S)
            self._evaluate()
            reason = self._reached()
            if reason is None and time.monotonic() >= self._alarm_s:
                reason = self._alarm()
            if reason is not None:
                self._rest()
                self._evaluate()
                return reason

    def _evaluate(self) -> None:
        """Look at what is due: at rounds that all have done, or at the models as they are."""
        if not self.experiment.asynchronous:
            while self._rounds and self._next_step <= self.step:
                k = int(self._next_step)
                found = self._models.pop(k, {})
                if not found:  # all joined later
                    self._next_step += self.evaluate.steps or math.inf
                    continue
                time_s = max(at_s for at_s, _ in found.values())
                jobs = sum(self._told.pop(told) for told in list(self._told) if told < k)
                self._told[-1] = jobs  # of all rounds before
                self._shown = k, time_s, jobs, np.stack([found[i][1] for i in sorted(found)])
                self._look()
                self._shown = None
        elif self.step >= self._next_step:
            self._look()
        if self.time_s >= self._next_s or self.gradients >= self._next_gradients:
            self._look()

    def _measured(self) -> dict[str, float]:
        if self._shown is None:
            answers = self._ask("model")
            self._last = self.time_s, np.stack([answers[i][1] for i in sorted(answers)])
            models = self._last[1]
        else:
            models = self._shown[3]
        self.records.flush()
        row = {"time_s": self.time_s, "step": self.step, "gradients": self.gradients}
        row |= measure(models, self._evaluated)
        counts = self._totals()
        row["bytes"] = counts["bytes"]
        row["bytes_edge"] = counts["bytes"] / max(counts["messages"], 1)
        row |= self.records.staleness()
        busy_s = float(self.records.busy_s.sum())
        row["busy"] = busy_s / (self.n * self.time_s) if self.time_s else 0.0
        return row

    def _sound(self) -> bool:
        return True  # nodes refuse what is not finite

    # -- What a subclass does ------------------------------------------------------------------

    @abstractmethod
    def _launch(self, states: Mapping[int, dict[str, Any]] | None, now_s: float) -> None:
        """Begin all processes, and have their nodes stand where the run begins."""

    @abstractmethod
    def _listen(self, timeout_s: float) -> None:
        """Wait for reports so long at most, and take all that are there."""

    @abstractmethod
    def _ask(self, what: str) -> dict[int, Any]:
        """Node -> its "model" or "state"; of a process that is gone, its nodes do not answer."""

    @abstractmethod
    def _tell(self, seats: Sequence[P], what: str, each: Sequence[Any]) -> None:
        """Have the nodes of ``seats`` do ``what`` with each of some arguments."""

    # -- What processes say --------------------------------------------------------------------

    def _take(self, seat: P, told: NodeReport) -> None:
        if told.error is not None:
            kind, said = told.error
            raise (kind or ComputeError)(said)
        seat.told, seat.now_s, seat.heard_s = told, told.now_s, time.monotonic()
        seat.answers |= told.answers
        for loss in told.losses:
            self.experiment.task.report(loss)  # type: ignore[attr-defined]
        self._rounds |= told.rounds
        counts = sum(map(Counter, told.counts.values()), Counter())
        self._counts[self._seats.index(seat), seat.replaced] = counts
        self._rows += told.rows
        self._told.update(int(row[3]) for row in told.rows)
        for k, i, at_s, x in told.models:
            if k >= self._next_step:
                self._models.setdefault(k, {})[i] = at_s, x
        if told.inputs and self.experiment.record.trace:
            self.records.note({"inputs": told.inputs})

    def _arrive(self, all_: bool = False) -> None:
        """Arrivals enter the records in the order of time: those that no older can follow."""
        there = [seat.now_s for seat in self._seats if seat.here]
        horizon_s = math.inf if all_ else min(there, default=0.0)
        self._rows.sort()
        count = bisect_right(self._rows, (horizon_s,)) if not all_ else len(self._rows)
        for row in self._rows[:count]:
            if self.experiment.asynchronous:
                time_s, i, number, _, _, start_s, end_s = row
                read = bisect_right(self._ends, start_s)
                row = time_s, i, number, read, len(self._ends), start_s, end_s
                self._ends.append(time_s)
            self.records.rows.append(row)
        del self._rows[:count]
        if len(self.records.rows) >= ROWS_HELD:
            self.records.flush()

    def _await(self, done: Callable[[], bool], what: str) -> None:
        """Wait for as long as jobs take, and their processes say that they are there."""
        began_s = time.monotonic()
        remind_s = began_s + REMIND_S
        while not done():
            now_s = time.monotonic()
            for seat in self._seats:
                if now_s - max(began_s, seat.heard_s) > SILENT_S:
                    raise ComputeError(
                        f"node {seat.nodes[0]} did not {what}: its process said nothing for "
                        f"{SILENT_S:.0f} s; resume the run from its last checkpoint"
                    )
            if now_s >= remind_s:
                remind_s = now_s + REMIND_S
                text = f"waiting for jobs at hand, after which the nodes {what}"
                tell("waiting", text, WARNING, here=[])
            self._listen(LOOK_S)

    def _extend(self, limit: float) -> None:
        self._limit = limit
        self._tell(self._seats, "extend", [limit])
        for seat in self._seats:
            seat.limits += seat.here

    def _go(self) -> None:
        synchronous = not self.experiment.asynchronous
        self._extend(self.stop.steps if synchronous and self.stop.steps else math.inf)

    def _rest(self) -> None:
        """Have all nodes stand between rounds, in the same one, with nothing under way."""
        limit, seats, asynchronous = 0, self._seats, self.experiment.asynchronous
        before: list[int] = []
        while True:
            self._extend(limit)
            self._await(
                lambda: (
                    all(s.here and s.told.limits == s.limits for s in seats)
                    and (all(s.told.rests for s in seats) or self._reached_most() > self._limit)
                ),
                "come to rest",
            )
            if all(s.told.rests for s in seats):
                self._arrive(all_=True)
                # Who rests may be offered an exchange by who does not yet, and say so later.  Once
                # all have rested nobody offers one: who then says again that it rests, does.
                now = [s.replaced for s in seats]
                if now == before if asynchronous else len(set(self._rounds.values())) == 1:
                    self._frozen_s = self._clock_s()
                    return
                before = now
            limit = self._reached_most()  # who has begun a round needs the others in it

    def _reached_most(self) -> int:
        return 0 if self.experiment.asynchronous else max(s.told.reached for s in self._seats)

    # -- Checkpoints ---------------------------------------------------------------------------

    _COUNTERS = ("_next_step", "_next_s", "_next_gradients", "restarts")

    def state(self) -> dict[str, Any]:
        """See ``Loop``; the nodes come to rest for it, and go on."""
        if going := self._frozen_s is None:
            self._rest()
        while len(models := self._ask("model")) + len(states := self._ask("state")) < 2 * self.n:
            self._rest()  # a process has died: until its nodes are there again
        state = {
            "x": np.stack([models[i][1] for i in sorted(models)]).mean(axis=0),
            "gradients": self.gradients,
            "step": self.step,
            "time_s": self.time_s,
            "nodes": [states[i] for i in range(self.n)],
            "totals": dict(self._totals()),
            "told": [[k, count] for k, count in self._told.items()],
            "counters": {key: getattr(self, key) for key in self._COUNTERS},
            "replaced": [seat.replaced for seat in self._seats],
            "records": self.records.state(),
        }
        if going:
            self._frozen_s = None
            self._go()
        return state

    def restore(self, state: dict[str, Any]) -> None:
        self._started = True
        for key, value in state["counters"].items():
            setattr(self, key, value)
        self.records.restore(state["records"])
        self._ends.extend([-math.inf] * self.records.arrivals)
        for seat, replaced in zip(self._seats, state["replaced"], strict=True):
            seat.replaced = replaced
        self._told = Counter(dict(state["told"]))
        kept = sum((Counter(node["node"]["counts"]) for node in state["nodes"]), Counter())
        self._before = Counter(state["totals"]) - kept
        self._launch(dict(enumerate(state["nodes"])), state["time_s"])
