"""Where a training loop gets its jobs in its own process, from another thread."""

import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from importlib import import_module
from typing import Any, Protocol

from offbeat.runtime.base.errors import ComputeError, ConfigError
from offbeat.runtime.base.logs import FIRST_S, REMIND_S, log
from offbeat.runtime.compute.backend import JobRequest, JobResult
from offbeat.runtime.compute.flat import Flat

WAIT_S = 0.5  # a wait is cut short after so long, to look at signals


class Source(Protocol):
    """Who gives a loop its jobs."""

    def start(self) -> None:
        """The loop is ready."""

    @property
    def over(self) -> bool:
        """Whether the run is; what went wrong is raised here."""

    def next(self, patience_s: float | None) -> JobRequest | None:
        """The next job, waiting for it; None: the run is over.

        Raises:
            ComputeError: there was nobody to give one for ``patience_s``.
        """

    def replaced(self, order: JobRequest) -> bool:
        """Whether another job waits, since the answer to ``order`` would not count any more."""

    @property
    def delivered(self) -> bool:
        """Whether all that was answered may be changed."""

    def answer(self, order: JobRequest, answer: JobResult) -> None:
        """Have ``answer`` taken away."""

    def leave(self, why: str) -> None:
        """The loop gives back what it has not computed; may be called twice."""


class JobSource:
    """A source in this process.

    Args:
        answered: called, in the loop's thread, with what came of a job.
    """

    def __init__(self, answered: Callable[[JobResult], None]) -> None:
        self._answered = answered
        self._changed = threading.Condition()
        self._order: JobRequest | None = None  # to be taken,
        self._taken: JobRequest | None = None  # and not answered
        self._ended = False
        self._failure: BaseException | None = None

    # -- For who has the jobs ----------------------------------------------------------------------

    def put(self, order: JobRequest) -> None:
        """A job; the one before is answered."""
        with self._changed:
            self._order = order
            self._changed.notify_all()

    def end(self, failure: BaseException | None = None) -> None:
        """There will be no more; ``failure`` is raised in the loop."""
        with self._changed:
            self._ended, self._failure = True, failure
            self._changed.notify_all()

    # -- For the loop; see ``Source`` --------------------------------------------------------------

    def start(self) -> None:
        """Nothing."""

    @property
    def over(self) -> bool:
        if self._failure is not None:
            raise self._failure
        return self._ended

    def next(self, patience_s: float | None) -> JobRequest | None:
        began_s = time.monotonic()
        remind_s = began_s + FIRST_S
        with self._changed:
            while not self.over:
                if self._order is not None:
                    self._taken, self._order = self._order, None
                    return self._taken
                now_s = time.monotonic()
                whom, alone_s = self._awaited(began_s, now_s)
                if patience_s is not None and alone_s > patience_s:
                    raise ComputeError(
                        f"nobody of {whom} was heard for {alone_s:.0f} s; give join a longer "
                        "patience_s, where that may be"
                    )
                if alone_s and now_s >= remind_s:
                    remind_s = now_s + REMIND_S
                    log.warning("waiting for %s; after the end of a run there are none", whom)
                self._changed.wait(WAIT_S)
        return None

    def _awaited(self, began_s: float, now_s: float) -> tuple[str, float]:
        """Who has the jobs, and for how long nothing was heard of them."""
        return "the run", 0.0

    def replaced(self, order: JobRequest) -> bool:
        """See ``Source``: no job is taken back."""
        return False

    @property
    def delivered(self) -> bool:
        """See ``Source``: whoever is answered may keep what he is given."""
        return False

    def answer(self, order: JobRequest, answer: JobResult) -> None:
        self._taken = None
        self._answered(answer)

    def leave(self, why: str) -> None:
        """See ``Source``: the loop is given it again when it is back."""
        with self._changed:
            self._order, self._taken = self._order or self._taken, None


class ActorSource(JobSource):
    """The desk of a loop that is run here; ``join("ray", ...)`` in its thread finds it."""

    def seat(self, flat: Flat) -> "ActorSource":
        """A loop with these parameters sits down.

        Raises:
            ConfigError: they are not the run's.
        """
        order = self._order
        if order is not None and (like := (order.x.dtype, order.x.size)) != (flat.dtype, flat.dim):
            raise ConfigError(
                f"the model is another than the run's: {flat.dtype}[{flat.dim}] here, "
                f"{like[0]}[{like[1]}] there"
            )
        return self


HERE: ContextVar[ActorSource] = ContextVar("desk")


def called(loop: str | Callable[[str], object]) -> Callable[[str], Any]:
    """The function that ``loop`` names.

    >>> called("offbeat.runtime.compute.source:lost")
    Traceback (most recent call last):
    ...
    offbeat.ConfigError: own-loop: there is no "offbeat.runtime.compute.source:lost" here \
(module 'offbeat.runtime.compute.source' has no attribute 'lost'); it must be importable where \
the loop runs
    """
    if callable(loop):
        return loop
    module, _, name = loop.partition(":")
    try:
        found: Callable[[str], Any] = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f'own-loop: there is no "{loop}" here ({error}); it must be importable where the loop '
            "runs"
        ) from None
    return found
