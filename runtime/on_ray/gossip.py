"""Gossip on Ray actors: every actor has some nodes, and they speak to one another.

The driver is in no message's way.  It watches: it collects the trace and the models that are to be
evaluated, has all nodes come to rest for a checkpoint, notices that an actor is gone, begins
another, and tells the nodes of both.
"""

import copy
import math
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from threadpoolctl import threadpool_limits

from offbeat.runtime.base.errors import ComputeError, ConfigError
from offbeat.runtime.base.tensors import keep_freed
from offbeat.runtime.compute.backend import JobResult
from offbeat.runtime.gossip.driver import GossipDriver, Slot
from offbeat.runtime.gossip.hosted import Envelope, NodeLoop, NodeReport
from offbeat.runtime.node.channels import nbytes
from offbeat.runtime.node.effects import Compute
from offbeat.runtime.node.make import request
from offbeat.runtime.on_ray.loops import Loops, farewell, meet
from offbeat.runtime.on_ray.server import INLINE_BYTES, START_EACH_S, START_S, places, why
from offbeat.runtime.on_ray.start import last_line, load, start
from offbeat.runtime.run.records import Records
from offbeat.workers.tasks import device as devices
from offbeat.workers.work import OwnLoop

if TYPE_CHECKING:
    from offbeat.runtime.experiment.engines import Ray
    from offbeat.runtime.experiment.experiment import Experiment

WATCH_S = 0.1, 1.0  # between reports of an actor with nothing urgent to say: few actors, many
REPORTS_S = 20  # reports a second, of all actors: each costs as much as a message


class GossipActor:
    """What an actor is: nodes, and the actors of the others.

    Args:
        experiment: of which they are.
        nodes: their numbers.
        device: where the task computes; "cpu": where it does anyway.
        more: see ``NodeLoop``.
    """

    def __init__(
        self, experiment: "Experiment", nodes: Sequence[int], device: str, **more: Any
    ) -> None:
        keep_freed()
        threadpool_limits(1)  # as many processes as cores and more: one thread each
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)
        devices.placed(experiment.task, device)
        self._ray = load()
        self._posts: dict[int, Any] = {}  # node -> how its actor is called
        self._loops: Loops | None = None
        if isinstance(experiment.work, OwnLoop):
            self._loops = Loops(experiment.work, self._came)
            more |= {"elsewhere": self._give}
        self._steps = experiment.work.steps
        self._hosted = NodeLoop(experiment, nodes, self._carry, **more)

    def ready(self) -> None:
        """Nothing; an answer says that the actor is there."""

    def meet(self, actors: Sequence[tuple[Any, Sequence[int]]]) -> None:
        """Which actors have which nodes."""
        for actor, nodes in actors:
            post = actor.deliver.options(num_returns=0)
            self._posts |= dict.fromkeys(nodes, post)

    def begin(self, now_s: float, limit: float) -> None:
        self._hosted.begin(now_s, limit)

    def deliver(self, parcels: Sequence[Envelope], *large: Any) -> None:
        """Messages; items that are numbers stand for one of those that are ``large``."""
        if large:
            parcels = [
                p._replace(items=tuple(large[x] if type(x) is int else x for x in p.items))
                for p in parcels
            ]
        self._hosted.bring(parcels)

    def tell(self, what: str, each: Sequence[Any]) -> None:
        """See ``NodeLoop``, with each of some arguments."""
        for argument in each:
            self._hosted.tell(what, argument)

    def ask(self, question: int, what: str) -> None:
        self._hosted.ask(question, what)

    def report(self, wait_s: float) -> NodeReport:
        return self._hosted.report(wait_s)

    def _give(self, i: int, job: Compute) -> None:
        """A job for a loop."""
        assert self._loops is not None
        self._loops.give(request(i, job, self._steps))

    def _came(self, i: int, came: JobResult | Exception) -> None:
        """From a loop's thread: what became of its job."""
        if isinstance(came, Exception):
            self._hosted.failed(came)
        else:
            losses = [] if came.loss is None else [came.loss]
            self._hosted.computed(i, came.serial, losses, came.payload)

    def end(self) -> None:
        """The run is over: loops that are run here may end by themselves."""
        if self._loops is not None:
            self._loops.end()

    def _carry(self, parcels: list[Envelope]) -> None:
        """One call to every actor; what is large is put into Ray's store once."""
        stored: dict[int, Any] = {}
        calls: dict[int, tuple[Any, list[Envelope], list[Any]]] = {}
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


class GossipSlot(Slot):
    """An actor's place."""

    def __init__(self, nodes: list[int]) -> None:
        super().__init__(nodes)
        self.actor: Any = None
        self.ready: Any = None  # what is answered when its actor is there; None: it is
        self.watch: Any = None  # its next report
        self.limit_s = math.inf  # until when its actor has to be there, before START_EACH_S

    @property
    def here(self) -> bool:
        return self.ready is None


class RayGossip(GossipDriver[GossipSlot]):
    """A gossip run on Ray actors under a real clock.

    Args:
        experiment: what to run.
        options: see ``engines.ray``.
        records: where everything is written.
        around: see ``Loop``, and the seed.

    Raises:
        ConfigError: no Ray; no room; what cannot be under a real clock.
    """

    def __init__(
        self, experiment: "Experiment", options: "Ray", records: Records, **around: Any
    ) -> None:
        devices.check(experiment.task, options.device, here=options.address == "local")
        self._options, self._ray, self._device = options, load(), options.device
        n = experiment.task.workers
        count = math.ceil(n / options.workers_per_actor)
        seats = [GossipSlot(list(range(first, n, count))) for first in range(count)]
        least_s, most_s = WATCH_S
        self._watch_s = min(most_s, max(least_s, count / REPORTS_S))
        super().__init__(experiment, seats, records, **around)
        self._session = start(options.address)
        try:
            self._where = places(self._ray, count, options)
            meet(self._ray, experiment, options)
            self._make = self._ray.remote(concurrency_groups={"watch": 1})(GossipActor)
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
                raise ComputeError("the Ray actors did not start; is the cluster full?") from None
            except self._ray.exceptions.RayError as error:
                raise ComputeError(f"Ray actors cannot start: {last_line(error)}") from None
        self._zero_s = time.monotonic() - now_s * self.experiment.pace
        for seat in self._seats:
            self._introduce(seat, now_s)
        self._rest()

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
                    raise ComputeError(f"Ray actors cannot start: {last_line(error)}") from None
                self._lose(seat, why(error))
                continue
            if answered is seat.ready:
                self._came(seat)
            else:
                self._watch(seat)
                self._take(seat, told)
        begun = [seat for seat in self._seats if seat.ready is not None]
        for seat in begun:
            if time.monotonic() > seat.limit_s + START_EACH_S * len(begun):
                self._lose(seat, "it did not start again")
        self._arrive()

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

    def _tell(self, seats: Sequence[GossipSlot], what: str, each: Sequence[Any]) -> None:
        for seat in seats:
            if seat.ready is None:
                seat.actor.tell.remote(what, each)

    # -- Actors that come and go ---------------------------------------------------------------

    def _fill(self, seat: GossipSlot, **more: Any) -> None:
        options = self._options
        seat.actor = self._make.options(
            num_cpus=options.num_cpus,
            num_gpus=options.num_gpus,
            resources=options.resources,
            max_restarts=0,  # a new one is begun here, where its nodes are introduced
            scheduling_strategy=self._where[self._seats.index(seat)],
        ).remote(self._parts, seat.nodes, self._device, **more)
        seat.ready, seat.watch = seat.actor.ready.remote(), None
        seat.limits, seat.told = 0, NodeReport()
        seat.limit_s = time.monotonic() + START_S

    def _introduce(self, seat: GossipSlot, now_s: float) -> None:
        """Its actor is there: it gets to know the others, and begins."""
        seat.ready = None
        seat.actor.meet.remote([(other.actor, other.nodes) for other in self._seats])
        seat.actor.begin.remote(now_s, self._limit)
        seat.now_s = now_s
        self._watch(seat)

    def _watch(self, seat: GossipSlot) -> None:
        seat.watch = seat.actor.report.options(concurrency_group="watch").remote(self._watch_s)

    def _lose(self, seat: GossipSlot, why: str) -> None:
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
            raise ComputeError(
                f"node {first} is gone ({why}), and {name} cannot go on without it here; resume "
                "the run from its last checkpoint"
            )
        if not others:
            raise ComputeError(
                f"all nodes are gone, the last with node {first} ({why}); resume the run from its "
                "last checkpoint"
            )
        if seat.replaced >= self._options.restarts:
            raise ComputeError(
                f"the actor of node {first} was replaced {seat.replaced} times already ({why})"
            )
        self._tell(others, "down", seat.nodes)
        seat.replaced += 1
        self._fill(seat, incarnation=seat.replaced, joining=True)

    def _came(self, seat: GossipSlot) -> None:
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
        if isinstance(self.experiment.work, OwnLoop):
            here = [seat.actor for seat in self._seats if seat.actor is not None and seat.here]
            farewell(self._ray, here, "watch")
        for seat in self._seats:
            if seat.actor is not None:
                with suppress(self._ray.exceptions.RayError):
                    self._ray.kill(seat.actor)
                seat.actor, seat.ready = None, "never"
        self._parts = None
        self._session.stop()
