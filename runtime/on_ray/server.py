"""The compute backend of Ray actors.

Each actor computes for one or several workers, one call at a time with another one waiting.  What
its workers are given meanwhile goes along in the next call, as many orders as make a call of some
milliseconds: a call costs Ray a millisecond, however little it carries.
"""

import math
import sys
import time
import traceback
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref as weak

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from offbeat.runtime.base.errors import ComputeError, ConfigError
from offbeat.runtime.compute.backend import (
    ALONE_BYTES,
    Back,
    ComputeBackend,
    ComputeEvent,
    Failed,
    Gone,
    JobRequest,
    JobResult,
)
from offbeat.runtime.on_ray.loops import LoopRunner, farewell, meet, runner
from offbeat.runtime.on_ray.start import last_line, load, start
from offbeat.workers.tasks import device as devices
from offbeat.workers.work import Kept, OwnLoop

if TYPE_CHECKING:
    from offbeat.runtime.experiment.engines import Ray
    from offbeat.runtime.experiment.experiment import Experiment

CALLS = 2  # of an actor at a time: one is computed, one waits
CALL_S = 0.02  # of computing in a call, about
MOST_ORDERS = 1024  # in a call
MOST_BYTES = 2**22  # of models in a call, unless one is larger
INLINE_BYTES = 100_000  # models up to this size travel in the call, larger ones in Ray's store
START_S, START_EACH_S = 60.0, 10.0  # for all actors to be there, and more for each
AT_END = {"end": 1}  # beside what an actor computes, it can be told that the run is over
SHORTEST_S = 1e-3  # Ray waits in whole milliseconds


class Reply(NamedTuple):
    """What came of the orders of a call; ``done`` are those that did not fail."""

    done: list[int]
    losses: list[float | None]
    spent_s: list[float]
    payloads: Any  # [k, d] or k frames; of a single order [d] or a frame
    kept: Kept  # rows [k, ...]
    failed: dict[int, str]  # order -> traceback


Row = tuple[int, int, int, int, int]  # worker, shard, draw, steps, which model
# One argument is sent at half the cost of three: orders, what some workers keep, models [m, d].
Asked = tuple[list[Row], dict[int, Kept], NDArray | None]


class ServerActor:
    """What an actor is: a runner that is called with many orders at once.

    Args:
        parts: the task and the work.
        device: where the task computes; "cpu": where it does anyway.
    """

    def __init__(self, parts: tuple[Any, Any], device: str) -> None:
        threadpool_limits(1)  # as many processes as cores and more: one thread each
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)
        task, work = parts
        self._runner = runner(devices.placed(task, device), work)

    def ready(self) -> None:
        """Nothing; an answer says that the actor is there."""

    def end(self) -> None:
        """The run is over: loops that are run here may end by themselves."""
        if isinstance(self._runner, LoopRunner):
            self._runner.loops.end()

    def compute(self, asked: Asked, *large: NDArray) -> Reply:
        """Compute orders; ``large`` are models ``[d]`` from Ray's store, where they are large."""
        rows, kept, small = asked
        held = large if small is None else small
        orders = [
            JobRequest(at, worker, shard, draw, steps, 0, held[model], kept.get(at))
            for at, (worker, shard, draw, steps, model) in enumerate(rows)
        ]
        answers, failed = self._attempt(orders)
        payloads = [answer.payload for answer in answers]
        coded = any(isinstance(payload, bytes) for payload in payloads)
        return Reply(
            [answer.serial for answer in answers],
            [answer.loss for answer in answers],
            [answer.spent_s for answer in answers],
            payloads[0] if len(payloads) == 1 else payloads if coded else np.array(payloads),
            {
                name: np.concatenate([answer.kept[name] for answer in answers])
                for name in (answers[0].kept if answers else ())
            },
            failed,
        )

    def _attempt(self, orders: list[JobRequest]) -> tuple[list[JobResult], dict[int, str]]:
        """Answers, and the tracebacks of what failed."""
        try:
            return self._runner.compute(orders), {}
        except Exception:
            if len(orders) == 1:
                return [], {orders[0].serial: traceback.format_exc()}
        answers: list[JobResult] = []
        failed: dict[int, str] = {}
        for order in orders:  # one of them it was
            good, bad = self._attempt([order])
            answers += good
            failed |= bad
        return answers, failed


class ActorSlot:
    """An actor's place: the actor that is there now, and what it is to compute."""

    __slots__ = ("actor", "calls", "limit_s", "ready", "replaced", "waiting", "workers")

    def __init__(self, workers: list[int]) -> None:
        self.workers = workers
        self.actor: Any = None  # None: it will not be filled again
        self.ready: Any = None  # what is answered when its actor is there; None: it is
        self.limit_s = math.inf  # until when its actor has to be there, before START_EACH_S
        self.waiting: deque[JobRequest] = deque()
        self.calls = self.replaced = 0


class RayBackend(ComputeBackend):
    """Ray actors that compute.

    Args:
        experiment: whose jobs.
        options: see ``engines.ray``.
        folder: of the run.

    Raises:
        ConfigError: no Ray; actors that no machine has room for; a task that cannot travel.
        ComputeError: the actors do not start.
    """

    def __init__(
        self, experiment: "Experiment", options: "Ray", folder: Path | None = None
    ) -> None:
        n = experiment.fleet.workers
        count = math.ceil(n / options.workers_per_actor)
        self._options, self._ray = options, load()
        self._calls: dict[
            Any, tuple[ActorSlot, list[JobRequest]]
        ] = {}  # what is answered -> for what
        self._events: list[ComputeEvent] = []
        self._stored: dict[int, tuple[Any, Any]] = {}  # id of a model -> (weak, in the store)
        self._order_s: float | None = None  # of computing, lately
        self._seats = [ActorSlot(list(range(first, n, count))) for first in range(count)]
        self._seat = {worker: seat for seat in self._seats for worker in seat.workers}
        devices.check(experiment.task, options.device, here=options.address == "local")
        self._loops = isinstance(experiment.work, OwnLoop)
        self._session = start(options.address)
        try:
            self._where = places(self._ray, count, options)
            meet(self._ray, experiment, options, folder)
            groups = {"concurrency_groups": AT_END} if self._loops else {}
            self._make = (
                self._ray.remote(**groups)(ServerActor) if groups else self._ray.remote(ServerActor)
            )
            try:
                self._parts = self._ray.put((experiment.task, experiment.work)), options.device
            except (TypeError, AttributeError) as error:  # Ray explains itself at length
                raise ConfigError(
                    'engine = "ray": the task or its work cannot be sent to an actor '
                    f"({error.__cause__ or error})"
                ) from None
            for seat in self._seats:
                self._fill(seat)
            self._await_all(START_S + START_EACH_S * count)
        except BaseException:
            self.close()
            raise

    # -- Orders ----------------------------------------------------------------------------------

    def submit(self, order: JobRequest) -> None:
        seat = self._seat[order.worker]
        if seat.ready is not None:  # nobody is there: it will be submitted again
            return
        seat.waiting.append(order)
        if not seat.calls:
            self._call(seat)

    def cancel(self, serial: int) -> None:
        """See ``ComputeBackend``; what an actor has already is computed in vain."""
        for seat in self._seats:
            for order in seat.waiting:
                if order.serial == serial:
                    seat.waiting.remove(order)
                    return

    def _call(self, seat: ActorSlot) -> None:
        """Give an actor what waits for it, or as much of it as makes one call."""
        waiting = seat.waiting
        nbytes = waiting[0].x.nbytes
        most = 1
        if nbytes < ALONE_BYTES and self._order_s is not None:
            fast = int(CALL_S / max(self._order_s, 1e-9))
            most = max(1, min(MOST_ORDERS, MOST_BYTES // max(nbytes, 1), fast))
        orders = [waiting.popleft() for _ in range(min(most, len(waiting)))]
        models = list({id(order.x): order.x for order in orders}.values())  # each travels once
        at = {id(x): index for index, x in enumerate(models)}
        rows = [(o.worker, o.shard, o.draw, o.steps, at[id(o.x)]) for o in orders]
        kept = {place: o.kept for place, o in enumerate(orders) if o.kept is not None}
        if nbytes > INLINE_BYTES:
            asked: Asked = rows, kept, None
            large = [self._store(x) for x in models]
        else:
            asked, large = (rows, kept, np.array(models)), []
        self._calls[seat.actor.compute.remote(asked, *large)] = seat, orders
        seat.calls += 1

    def _store(self, x: NDArray) -> Any:
        """``x`` in Ray's store, where it stays for as long as anybody here has it."""
        key = id(x)
        if key not in self._stored:
            gone = weak(x, lambda _: self._stored.pop(key, None))
            self._stored[key] = gone, self._ray.put(x)
        return self._stored[key][1]

    # -- Answers ---------------------------------------------------------------------------------

    def collect(self, timeout_s: float) -> Sequence[ComputeEvent]:
        for seat in self._seats:
            while seat.waiting and seat.calls < CALLS:
                self._call(seat)
        if not self._events:
            self._listen(timeout_s)
        events, self._events = self._events, []
        return events

    def _listen(self, timeout_s: float) -> None:
        """Wait for answers, and take all that are there."""
        self._session.check()
        pings = {seat.ready: seat for seat in self._seats if seat.ready is not None and seat.actor}
        asked = [*pings, *self._calls]
        if 0 < timeout_s < SHORTEST_S or not asked:
            time.sleep(timeout_s)
            timeout_s = 0.0
        if not asked:
            return
        ready, _ = self._ray.wait(asked, num_returns=1, timeout=timeout_s)
        if ready and len(asked) > 1:
            ready, _ = self._ray.wait(asked, num_returns=len(asked), timeout=0)
        for answered in ready:
            if answered in pings:
                self._came(pings[answered])
            elif answered in self._calls:  # else its actor died, as another answer said
                self._take(answered)
        for ping, seat in pings.items():
            limit_s = seat.limit_s + START_EACH_S * len(pings)
            if seat.ready is ping and time.monotonic() > limit_s:
                self._lose(seat, "it did not start again", refill=False)

    def _take(self, answered: Any) -> None:
        seat, orders = self._calls[answered]
        try:
            reply: Reply = self._ray.get(answered)
        except self._ray.exceptions.RayTaskError as error:  # of no order in particular
            del self._calls[answered]
            seat.calls -= 1
            self._events += [Failed(order.serial, str(error)) for order in orders]
            return
        except self._ray.exceptions.RayError as error:
            self._lose(seat, why(error))
            return
        del self._calls[answered]
        seat.calls -= 1
        if reply.done:
            lately_s = sum(reply.spent_s) / len(reply.done)
            before_s = lately_s if self._order_s is None else self._order_s
            self._order_s = (lately_s + before_s) / 2
        alone = len(reply.done) == 1
        for j, place in enumerate(reply.done):
            # A row of many is copied: one slow worker's would keep all of them in memory.
            payload = reply.payloads if alone else reply.payloads[j]
            if not alone and isinstance(payload, np.ndarray):
                payload = payload.copy()
            kept = {
                name: held if alone else held[j : j + 1].copy() for name, held in reply.kept.items()
            }
            loss, spent_s = reply.losses[j], reply.spent_s[j]
            self._events.append(JobResult(orders[place].serial, loss, payload, kept, spent_s))
        self._events += [Failed(orders[at].serial, said) for at, said in reply.failed.items()]

    # -- Actors that come and go -----------------------------------------------------------------

    def _fill(self, seat: ActorSlot) -> None:
        """Begin an actor."""
        options = self._options
        seat.actor = self._make.options(
            num_cpus=options.num_cpus,
            num_gpus=options.num_gpus,
            resources=options.resources,
            max_restarts=0,  # a new one is begun here, where it is told what the old one knew
            scheduling_strategy=self._where[self._seats.index(seat)],
        ).remote(*self._parts)
        seat.ready = seat.actor.ready.remote()
        seat.limit_s = time.monotonic() + START_S

    def _await_all(self, limit_s: float) -> None:
        """Wait until every actor is there."""
        until_s = time.monotonic() + limit_s
        while missing := [seat for seat in self._seats if seat.ready is not None and seat.actor]:
            if time.monotonic() > until_s:
                raise ComputeError(
                    f"of {len(self._seats)} Ray actors {len(missing)} did not start within "
                    f"{limit_s:.0f} s; is the cluster full?"
                )
            self._ray.wait([seat.ready for seat in missing], timeout=1.0)
            for seat in missing:
                if self._ray.wait([seat.ready], timeout=0)[0]:
                    self._came(seat)
        self._events.clear()

    def _came(self, seat: ActorSlot) -> None:
        try:
            self._ray.get(seat.ready)
        except self._ray.exceptions.RayError as error:
            if getattr(error, "actor_init_failed", False):
                raise ComputeError(f"Ray actors cannot start: {last_line(error)}") from None
            self._lose(seat, why(error))
            return
        seat.ready = None
        self._events += [Back(worker) for worker in seat.workers]

    def _lose(self, seat: ActorSlot, why: str, refill: bool = True) -> None:
        """An actor is dead: another takes its seat, or its workers go to other seats."""
        if seat.ready is None:
            self._events += [Gone(worker, why) for worker in seat.workers]
        for answered in [a for a, (whose, _) in self._calls.items() if whose is seat]:
            del self._calls[answered]
        seat.calls = 0
        seat.waiting.clear()
        self._kill(seat)
        if refill and seat.replaced < self._options.restarts and self._room():
            seat.replaced += 1
            self._fill(seat)
            return
        seat.actor, seat.ready = None, "never"
        if not (others := [other for other in self._seats if other.actor is not None]):
            raise ComputeError(
                f"no Ray actor is left: each was replaced {self._options.restarts} times; "
                f"the last one: {why}"
            )
        for at, worker in enumerate(seat.workers):
            other = others[at % len(others)]
            other.workers.append(worker)
            self._seat[worker] = other
            if other.ready is None:
                self._events.append(Back(worker))
        seat.workers = []

    def _room(self) -> bool:
        """Whether the machines that are left have room for all actors; says where."""
        try:
            self._where = places(self._ray, len(self._seats), self._options)
        except ConfigError:
            return False
        return True

    def _kill(self, seat: ActorSlot) -> None:
        with suppress(self._ray.exceptions.RayError):
            self._ray.kill(seat.actor)

    def ended(self, reason: str) -> None:
        """See ``ComputeBackend``: loops end by themselves, if they do soon."""
        if self._loops:
            farewell(self._ray, [seat.actor for seat in self._seats if seat.ready is None], "end")

    def close(self) -> None:
        """See ``ComputeBackend``: the actors, and the Ray that was begun for them."""
        for seat in self._seats:
            if seat.actor is not None:
                self._kill(seat)
                seat.actor, seat.ready = None, "never"
        self._calls.clear()
        self._stored.clear()
        self._session.stop()


def places(ray: Any, count: int, options: "Ray") -> list[Any]:
    """Where each of ``count`` actors goes, as Ray is told.

    Raises:
        ConfigError: there is no room for them.
    """
    needs = {"CPU": options.num_cpus, "GPU": options.num_gpus, **(options.resources or {})}
    needs = {name: amount for name, amount in needs.items() if amount}
    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    rooms = {
        node: min(
            (int(has.get(name, 0.0) / amount + 1e-9) for name, amount in needs.items()),
            default=count,
        )
        for node, has in nodes.items()
    }
    if (room := sum(rooms.values())) < count:
        need = ", ".join(f"{amount:g} {name}" for name, amount in needs.items())
        raise ConfigError(
            f'engine = "ray": {count} actors with {need} each do not fit, there is room for '
            f"{room}; take more workers_per_actor or ask for less"
        )
    if options.placement == "spread" and needs:
        return ["SPREAD"] * count  # Ray knows what others have taken
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

    here = ray.get_runtime_context().get_node_id()
    order = sorted(rooms, key=lambda node: node != here)  # this machine first
    if options.placement == "spread":
        chosen = order * count
    else:
        chosen = [node for node in order for _ in range(rooms[node])]
    return [On(node, soft=False) for node in chosen[:count]]


def why(error: Exception) -> str:
    """Part of a sentence: what became of an actor."""
    said = str(error)
    known = {
        "ray.kill": "its Ray actor was killed",
        "memory": "its Ray actor ran out of memory",  # its node's, Ray says
        "node": "its machine is gone",
    }
    if "connection error code 2" in said:
        return "the process of its Ray actor died"
    return next((text for key, text in known.items() if key in said), last_line(error))
