"""What a server method is told, and what it may do."""

from abc import ABC, abstractmethod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from offbeat.algorithms.base import ALGORITHMS as ALGORITHMS  # for the methods' files
from offbeat.runtime.base.registry import Spec


class Update(Protocol):
    """The result of one job."""

    worker: int
    number: int
    """The worker's own count of its jobs, from 0."""
    steps: int
    """Local steps of the job; 1 where it was one gradient."""
    shard: int
    """Whose data it used; the worker's, where the method said nothing else."""
    step: int
    """The server step whose model the job was given."""
    x: NDArray
    """That model, ``[d]``; read-only."""
    payload: Any
    """What the work made of it, ``[d]``: a gradient, or x less the model after local steps."""
    loss: float | None
    """The loss on the job's sample; None where its worker did not say."""
    start_s: float
    """When its worker began it."""
    end_s: float
    """When its worker was done."""
    time_s: float
    """When it reached the server."""


class Server(Protocol):
    """All that a method can see and do."""

    x: NDArray
    """The model ``[d]``; replaced at every step, never changed in place."""
    step: int
    """Steps taken so far."""
    n: int
    """Number of workers; they are 0..n-1."""
    shards: int
    """Parts that the data is divided in, 0..shards-1; worker i's own is i."""
    steps: int
    """Local steps of a job where nothing else is said."""

    @property
    def sizes(self) -> NDArray:
        """``[shards]``: how much data each shard has."""
        ...

    @property
    def tensors(self) -> list[slice]:
        """Where each tensor of the model lies in ``x``; all of it, where the task does not say."""
        ...

    @property
    def outstanding(self) -> int:
        """Jobs handed out and not yet back."""
        ...

    def apply(self, delta: NDArray) -> None:
        """x <- x - delta; one step."""
        ...

    def assign(
        self,
        worker: int,
        like: Update | None = None,
        *,
        steps: int | None = None,
        shard: int | None = None,
        at: NDArray | None = None,
        since_s: float | None = None,
    ) -> None:
        """Queue a job for ``worker``: the model of this moment, or the one ``like`` had.

        Args:
            worker: who.
            like: an update whose model and step it shall have.
            steps: local steps; the work's own number if absent.
            shard: whose data; the worker's own if absent.
            at: another model ``[d]`` to begin with; not to be changed afterwards.
            since_s: it counts as begun then, before now.  Only a virtual clock can do that.
        """
        ...

    def after(self, seconds: float, token: int = 0) -> None:
        """Have ``timer`` called with ``token`` when so many seconds have passed (inf: never)."""
        ...

    def cancel(self, worker: int) -> int:
        """Drop every outstanding job of ``worker``; answers how many there were."""
        ...

    def speed(self, worker: int) -> float:
        """Observed jobs per busy second of ``worker``; 0 before its first result."""
        ...

    def rng(self, purpose: str, index: int = 0) -> np.random.Generator:
        """The generator at address (run seed, purpose, index)."""
        ...


class Algorithm(ABC):
    """Base of server methods: two events to answer, and three more with a plain default.

    All state is in fields that can be written to a checkpoint: numbers, text, arrays, lists and
    dictionaries of these, and objects that are made of these.
    """

    spec: Spec | None = None
    any_shard = False
    """Whether its jobs can be on any shard; only then may there be more shards than workers."""

    def check(self, n: int) -> None:  # noqa: B027 - most have nothing to refuse
        """Raise ConfigError where the method cannot run on n workers."""

    def start(self, server: Server) -> None:
        """The run begins: hand out the first jobs."""
        for worker in range(server.n):
            server.assign(worker)

    @abstractmethod
    def arrive(self, server: Server, update: Update) -> None:
        """A result is in."""

    def timer(self, server: Server, token: int) -> None:  # noqa: B027 - nor to be told of
        """The time that ``server.after`` was given has passed; nothing by default."""

    def lost(self, server: Server, worker: int) -> None:  # noqa: B027 - nor to mend
        """A job of ``worker`` is gone and will not come back; nothing by default."""

    def joined(self, server: Server, worker: int, lost: int) -> None:
        """``worker`` is back; of its jobs ``lost`` (0 too) are lost: it gets as many by default."""
        for _ in range(lost):
            server.assign(worker)
