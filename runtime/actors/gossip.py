"""Gossip on Ray actors: every actor has some nodes, and they speak to one another.

The driver is in no message's way.  It watches: it collects the trace and the models that are to be
evaluated, has all nodes come to rest for a checkpoint, notices that an actor is gone, begins
another, and tells the nodes of both.
"""

import copy
import math
import sys
import time
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from offbeat.algorithms.gossip import Gossip
from offbeat.runtime.actors.crew import INLINE_BYTES, START_EACH_S, START_S, last_line, places, why
from offbeat.runtime.actors.start import load, start
from offbeat.runtime.errors import ConfigError, CrewError
from offbeat.runtime.gossip import COUNTS, measure
from offbeat.runtime.hosted import Hosted, Parcel, Report
from offbeat.runtime.loop import Loop
from offbeat.runtime.node import gossip_node
from offbeat.runtime.peer import nbytes
from offbeat.runtime.records import ROWS_HELD, Records

if TYPE_CHECKING:
    from offbeat.runtime.backends import Ray
    from offbeat.runtime.experiment import Experiment

WATCH_S = 0.1  # between reports of an actor with nothing urgent to say
LOOK_S = 0.1  # seconds after which a wait is interrupted for signals and checkpoints
REST_S = 600.0  # within which nodes come to rest, or answer


class GossipHost:
    """What an actor is: nodes, and the actors of the others.

    Args:
        experiment: of which they are.
        nodes: their numbers.
        device: where the task computes; "": where it does anyway.
        more: see ``Hosted``.
    """

    def __init__(
        self, experiment: "Experiment", nodes: Sequence[int], device: str, **more: Any
    ) -> None:
        threadpool_limits(1)  # as many processes as cores and more: one thread each
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)
        if device:
            experiment.task.to(device)  # type: ignore[attr-defined]
        self._ray = load()
        self._posts: dict[int, Any] = {}  # node -> how its actor is called
        self._hosted = Hosted(experiment, nodes, self._carry, **more)

    def ready(self) -> None:
        """Nothing; an answer says that the actor is there."""

    def meet(self, actors: Sequence[tuple[Any, Sequence[int]]]) -> None:
        """Which actors have which nodes."""
        for actor, nodes in actors:
            post = actor.deliver.options(num_returns=0)
            self._posts |= dict.fromkeys(nodes, post)

    def begin(self, now_s: float, limit: float) -> None:
        """See ``Hosted``."""
        self._hosted.begin(now_s, limit)

    def deliver(self, parcels: Sequence[Parcel], *large: Any) -> None:
        """Messages; items that are numbers stand for one of those that are ``large``."""
        if large:
            parcels = [
                p._replace(items=tuple(large[x] if type(x) is int else x for x in p.items))
                for p in parcels
            ]
        self._hosted.deliver(parcels)

    def tell(self, what: str, each: Sequence[Any]) -> None:
        """See ``Hosted``, with each of some arguments."""
        for argument in each:
            self._hosted.tell(what, argument)

    def ask(self, question: int, what: str) -> None:
        """See ``Hosted``."""
        self._hosted.ask(question, what)

    def report(self, wait_s: float) -> Report:
        """See ``Hosted``."""
        return self._hosted.report(wait_s)

    def _carry(self, parcels: list[Parcel]) -> None:
        """One call to every actor; what is large is put into Ray's store once."""
        stored: dict[int, Any] = {}
        calls: dict[int, tuple[Any, list[Parcel], list[Any]]] = {}
        for p in parcels:
            post = self._posts[p.to]
            _, sent, large = calls.setdefault(id(post), (post, [], []))
            items: list[Any] = []
            for item in p.items:
                if item is not None and nbytes([item]) > INLINE_BYTES:
                    if id(item) not in stored:
                        stored[id(item)] = self._ray.put(item)
                    large.append(stored[id(item)])
                    item = len(large) - 1  # type: ignore[assignment]
                items.append(item)
            sent.append(p._replace(items=tuple(items)))
        for post, sent, large in calls.values():
            post.remote(sent, *large)


class Seat:
    """An actor's place, and what is known of its nodes."""

    def __init__(self, nodes: list[int]) -> None:
        self.nodes = nodes
        self.actor: Any = None
        self.ready: Any = None  # what is answered when its actor is there; None: it is
        self.watch: Any = None  # its next report
        self.limit_s = math.inf  # until when its actor has to be there
        self.replaced = 0
        self.limits = 0  # that were set since its actor began
        self.told: Report = Report()  # the last report
        self.now_s = 0.0  # of its last report
        self.answers: dict[int, Any] = {}


class RayGossip(Loop):
    """A gossip run on Ray actors under a real clock.

    Args:
        experiment: what to run.
        options: see ``backends.ray``.
        records: where everything is written.
        seed: of the run.
        around: see ``Loop``.

    Raises:
        ConfigError: no Ray; no room; what cannot be under a real clock.
    """

    def __init__(
        self,
        experiment: "Experiment",
        options: "Ray",
        records: Records,
        *,
        seed: int,
        **around: Any,
    ) -> None:
        super().__init__(experiment.task, records, **around)
        assert isinstance(experiment.algorithm, Gossip)
        self.experiment, self.method, self.n = (
            experiment,
            experiment.algorithm,
            experiment.task.workers,
        )
        self._bears = gossip_node(experiment, 0).bears
        device = "" if options.device == "cpu" else options.device
        if device and not hasattr(experiment.task, "to"):
            raise ConfigError(f'engine = "ray": this task cannot compute on device = "{device}"')
        self._options, self._ray, self._device = options, load(), device
        count = math.ceil(self.n / options.workers_per_actor)
        self._seats = [Seat(list(range(first, self.n, count))) for first in range(count)]
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
        self._session = start(options.address)
        try:
            self._where = places(self._ray, count, options)
            self._make = self._ray.remote(concurrency_groups={"watch": 1})(GossipHost)
            try:
                travels = copy.copy(experiment)
                object.__setattr__(travels, "engine", None)  # not the nodes' business
                self._parts = self._ray.put(travels)
            except (TypeError, AttributeError) as error:
                raise ConfigError(
                    f'engine = "ray": the experiment cannot be sent to an actor ({error})'
                ) from None
        except BaseException:
            self.close()
            raise

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

    def _launch(self, states: Mapping[int, dict[str, Any]] | None, now_s: float) -> None:
        """Begin all actors, and have their nodes stand where the run begins."""
        for seat in self._seats:
            mine = None if states is None else {i: states[i] for i in seat.nodes}
            self._fill(seat, incarnation=seat.replaced, states=mine)
        until_s = time.monotonic() + START_S + START_EACH_S * len(self._seats)
        for seat in self._seats:
            try:
                self._ray.get(seat.ready, timeout=max(0.0, until_s - time.monotonic()))
            except self._ray.exceptions.GetTimeoutError:
                raise CrewError("the Ray actors did not start; is the cluster full?") from None
            except self._ray.exceptions.RayError as error:
                raise CrewError(f"Ray actors cannot start: {last_line(error)}") from None
        self._zero_s = time.monotonic() - now_s * self.experiment.pace
        for seat in self._seats:
            self._introduce(seat, now_s)
        self._rest()

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

    # -- What actors say -----------------------------------------------------------------------

    def _listen(self, timeout_s: float) -> None:
        """Wait for reports and new actors, and take all that are there."""
        self._session.check()
        waits = {s.watch if s.ready is None else s.ready: s for s in self._seats}
        ready, _ = self._ray.wait(list(waits), num_returns=1, timeout=timeout_s)
        if ready:
            ready, _ = self._ray.wait(list(waits), num_returns=len(waits), timeout=0)
        for answered in ready:
            seat = waits[answered]
            try:
                told = self._ray.get(answered)
            except self._ray.exceptions.RayError as error:
                if getattr(error, "actor_init_failed", False):
                    raise CrewError(f"Ray actors cannot start: {last_line(error)}") from None
                self._lose(seat, why(error))
                continue
            if answered is seat.ready:
                self._came(seat)
            else:
                self._watch(seat)
                self._take(seat, told)
        for seat in self._seats:
            if seat.ready is not None and time.monotonic() > seat.limit_s:
                self._lose(seat, "it did not start again")
        self._arrive()

    def _take(self, seat: Seat, told: Report) -> None:
        if told.error is not None:
            kind, said = told.error
            raise (kind or CrewError)(said)
        seat.told, seat.now_s = told, told.now_s
        seat.answers |= told.answers
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
        there = [seat.now_s for seat in self._seats if seat.ready is None]
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
        until_s = time.monotonic() + REST_S
        while not done():
            if time.monotonic() > until_s:
                raise CrewError(f"the nodes did not {what} within {REST_S:.0f} s")
            self._listen(LOOK_S)

    def _ask(self, what: str) -> dict[int, Any]:
        """Node -> what it answers; of an actor that is gone, its nodes do not."""
        self._questions += 1
        question, asked = self._questions, [s for s in self._seats if s.ready is None]
        who = [(seat, seat.replaced) for seat in asked]
        for seat in asked:
            seat.actor.ask.remote(question, what)
        self._await(
            lambda: all(question in s.answers or s.replaced != times for s, times in who), "answer"
        )
        return {i: x for s in asked for i, x in s.answers.pop(question, {}).items()}

    def _tell(self, seats: Sequence[Seat], what: str, each: Sequence[Any]) -> None:
        for seat in seats:
            if seat.ready is None:
                seat.actor.tell.remote(what, each)

    def _extend(self, limit: float) -> None:
        self._limit = limit
        self._tell(self._seats, "extend", [limit])
        for seat in self._seats:
            seat.limits += seat.ready is None

    def _go(self) -> None:
        synchronous = not self.experiment.asynchronous
        self._extend(self.stop.steps if synchronous and self.stop.steps else math.inf)

    def _rest(self) -> None:
        """Have all nodes stand between rounds, in the same one, with nothing under way."""
        limit, seats = 0, self._seats
        while True:
            self._extend(limit)
            self._await(
                lambda: (
                    all(s.ready is None and s.told.limits == s.limits for s in seats)
                    and (all(s.told.rests for s in seats) or self._reached_most() > self._limit)
                ),
                "come to rest",
            )
            if all(s.told.rests for s in seats):
                self._arrive(all_=True)
                if self.experiment.asynchronous or len(set(self._rounds.values())) == 1:
                    self._frozen_s = self._clock_s()
                    return
            limit = self._reached_most()  # who has begun a round needs the others in it

    def _reached_most(self) -> int:
        return 0 if self.experiment.asynchronous else max(s.told.reached for s in self._seats)

    # -- Actors that come and go ---------------------------------------------------------------

    def _fill(self, seat: Seat, **more: Any) -> None:
        options = self._options
        seat.actor = self._make.options(
            num_cpus=options.num_cpus,
            num_gpus=options.num_gpus,
            resources=options.resources,
            max_restarts=0,  # a new one is begun here, where its nodes are introduced
            scheduling_strategy=self._where[self._seats.index(seat)],
        ).remote(self._parts, seat.nodes, self._device, **more)
        seat.ready, seat.watch = seat.actor.ready.remote(), None
        seat.limits, seat.told = 0, Report()
        seat.limit_s = time.monotonic() + START_S

    def _introduce(self, seat: Seat, now_s: float) -> None:
        """Its actor is there: it gets to know the others, and begins."""
        seat.ready = None
        seat.actor.meet.remote([(other.actor, other.nodes) for other in self._seats])
        seat.actor.begin.remote(now_s, self._limit)
        seat.now_s = now_s
        self._watch(seat)

    def _watch(self, seat: Seat) -> None:
        seat.watch = seat.actor.report.options(concurrency_group="watch").remote(WATCH_S)

    def _lose(self, seat: Seat, why: str) -> None:
        """An actor is dead: its neighbours are told, and another is begun."""
        now_s, first = self._clock_s(), seat.nodes[0]
        if seat.ready is None:
            for i in seat.nodes:
                self.records.event({"event": "gone", "worker": i, "why": why}, now_s)
                self._rounds.pop(i, None)
        with suppress(self._ray.exceptions.RayError):
            self._ray.kill(seat.actor)
        others = [other for other in self._seats if other is not seat and other.ready is None]
        name = self.method.spec.name if self.method.spec else type(self.method).__name__
        if not self._bears:
            raise CrewError(
                f"node {first} is gone ({why}), and {name} cannot go on without it here; resume "
                "the run from its last checkpoint"
            )
        if not others:
            raise CrewError(
                f"all nodes are gone, the last with node {first} ({why}); resume the run from its "
                "last checkpoint"
            )
        if seat.replaced >= self._options.restarts:
            raise CrewError(
                f"the actor of node {first} was replaced {seat.replaced} times already ({why})"
            )
        self._tell(others, "down", seat.nodes)
        seat.replaced += 1
        self._fill(seat, incarnation=seat.replaced, joining=True)

    def _came(self, seat: Seat) -> None:
        """A new actor is there, whose nodes know nothing."""
        now_s = self._clock_s()
        self.restarts += 1
        self._introduce(seat, now_s)
        here = [other for other in self._seats if other.ready is None]
        others = [other for other in here if other is not seat]
        for other in others:
            other.actor.meet.remote([(seat.actor, seat.nodes)])
        self._tell(others, "up", seat.nodes)
        self._tell([seat], "up", [i for other in here for i in other.nodes])
        for i in seat.nodes:
            self.records.event({"event": "back", "worker": i}, now_s)

    def close(self) -> None:
        """See ``Loop``: the actors, and the Ray that was begun for them."""
        for seat in self._seats:
            if seat.actor is not None:
                with suppress(self._ray.exceptions.RayError):
                    self._ray.kill(seat.actor)
                seat.actor, seat.ready = None, "never"
        self._parts = None
        self._session.stop()

    # -- Checkpoints ---------------------------------------------------------------------------

    _COUNTERS = ("_next_step", "_next_s", "_next_gradients", "restarts")

    def state(self) -> dict[str, Any]:
        """See ``Loop``; the nodes come to rest for it, and go on."""
        if going := self._frozen_s is None:
            self._rest()
        while len(models := self._ask("model")) + len(states := self._ask("state")) < 2 * self.n:
            self._rest()  # an actor has died: until its nodes are there again
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
        """See ``Loop``."""
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
