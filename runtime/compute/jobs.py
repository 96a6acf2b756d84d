"""Jobs, and what else happens in a run with a server: what its loop is told of, in order."""

from typing import Any, NamedTuple, final

from numpy.typing import NDArray


@final
class Job:
    """One assigned computation, and after it its result; what a method sees as ``Update``."""

    __slots__ = (
        "assigned_s",
        "draw",
        "dropped",
        "end_s",
        "kept",
        "late",
        "loss",
        "nbytes",
        "number",
        "order",
        "payload",
        "serial",
        "shard",
        "spent_s",
        "start_s",
        "step",
        "steps",
        "time_s",
        "worker",
        "x",
    )
    x: Any  # the model [d]; None once dropped
    payload: Any
    kept: dict[str, NDArray]  # rows [1, ...] that its worker shall keep; set where there are any
    late: bool  # of a backend: it took longer than its worker would have
    spent_s: float  # of a backend: real seconds
    loss: float | None
    nbytes: int  # of its compressed update
    order: int  # of start, among all jobs: breaks ties
    start_s: float
    end_s: float
    time_s: float

    def __init__(
        self, serial: int, worker: int, number: int, x: NDArray, step: int, assigned_s: float
    ) -> None:
        self.serial, self.worker, self.number = serial, worker, number
        self.shard, self.draw, self.steps = worker, number, 1  # as for one gradient
        self.x, self.step, self.assigned_s = x, step, assigned_s
        self.payload = None
        self.order = -1  # not started
        self.dropped = False


class More(NamedTuple):
    """What a job can say beside its model."""

    steps: int | None = None  # None: the work's own number
    shard: int | None = None  # None: the worker's own data
    since_s: float | None = None  # it counts as begun then, before now


class Left(NamedTuple):
    """A worker went away; ``jobs`` are what it had not finished."""

    worker: int
    jobs: list[Job]


class Joined(NamedTuple):
    """A worker is back."""

    worker: int


class Timer(NamedTuple):
    """A time that the method asked to be told of; ``token`` is its own."""

    token: int


class TraceNote(NamedTuple):
    """Something that is no business of the method, for the records."""

    row: dict[str, Any]
