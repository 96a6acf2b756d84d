"""The connection of a training loop: a thread of its own speaks to the server."""

import os
import select
import threading
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zmq
from numpy.typing import NDArray

from offbeat.runtime.base.errors import ComputeError, ConfigError
from offbeat.runtime.base.logs import FIRST_S, REMIND_S, log
from offbeat.runtime.compute.backend import JobRequest, JobResult
from offbeat.runtime.compute.source import WAIT_S
from offbeat.runtime.on_zeromq.worker import FAREWELL_S, Worker
from offbeat.runtime.protocol.messages import Welcome, kinds, manifest


class Courier(Worker):
    """Fetches jobs and takes results away while the loop goes on.

    Args:
        endpoint, name, folder: see ``Worker``.
        x: a model like the loop's, ``[d]``.
        shapes: of its parameters; see ``runtime.base.shapes``.
        memory: makes buffers in which models are received.
    """

    _apart = False

    def __init__(
        self,
        endpoint: str,
        name: str,
        folder: Path | None,
        x: NDArray,
        shapes: str,
        memory: Callable[[int], NDArray[np.uint8]],
    ) -> None:
        super().__init__(endpoint, name, folder)
        self.spoke.pool.make = memory
        self._kinds, self._shapes = kinds(x, {}), shapes
        self._changed = threading.Condition()  # guards the spoke
        self._failure: BaseException | None = None
        self._why = ""  # it leaves
        self._heard_s = time.monotonic()  # when there last was a server
        self._ear, self._mouth = os.pipe()  # has the thread look up
        os.set_blocking(self._mouth, False)
        self._thread = threading.Thread(target=self._attend, name="courier", daemon=True)

    # -- For the loop ----------------------------------------------------------------------------

    def start(self) -> None:
        """Say hello."""
        self._thread.start()

    @property
    def over(self) -> bool:
        """Whether the run is; what went wrong with the connection is raised here."""
        if self._failure is not None:
            raise self._failure
        return self.spoke.state == "over"

    def next(self, patience_s: float | None) -> JobRequest | None:
        """The next job, waiting for it; None: the run is over.

        Raises:
            ComputeError: there was no server for ``patience_s``.
        """
        began_s = time.monotonic()
        remind_s = began_s + FIRST_S
        with self._changed:
            while not self.over:
                if (order := self.spoke.take()) is not None:
                    return order
                now_s = time.monotonic()
                alone_s = now_s - self._heard_s if self._alone else 0.0
                if patience_s is not None and alone_s > patience_s:
                    raise ComputeError(
                        f"no server at {self.endpoint} for {alone_s:.0f} s{self._lack()}; begin "
                        "it with offbeat serve EXPERIMENT.toml, or give join a longer patience_s"
                    )
                if now_s >= remind_s and (alone_s or now_s >= began_s + REMIND_S):
                    remind_s = now_s + REMIND_S
                    what = "the server" if alone_s else "a job of the server"
                    ended = "; after the end of its run there is none" if alone_s else ""
                    log.warning(
                        "waiting for %s at %s%s%s", what, self.endpoint, self._lack(), ended
                    )
                self._changed.wait(WAIT_S)
        return None

    def replaced(self, order: JobRequest) -> bool:
        """See ``Source``: a server that was gone is back, and has no use for this job."""
        return bool(self.spoke.orders) and not self.spoke.wants(order)

    @property
    def delivered(self) -> bool:
        """Whether the server has all that was answered."""
        with self._changed:
            return not self.spoke.pending

    def answer(self, order: JobRequest, answer: JobResult) -> None:
        """Have ``answer`` taken to the server; it is not to be changed before it is there."""
        with self._changed:
            self.spoke.answer(order, answer, time.monotonic())
        self._look_up()

    def leave(self, why: str) -> None:
        """Hand back what is not computed, and end; may be called twice."""
        self._why = why
        self._leaving = True
        if self._thread.is_alive():
            self._look_up()
            self._thread.join()
        if not self._context.closed:
            self.close()
            os.close(self._ear)
            os.close(self._mouth)

    def _look_up(self) -> None:
        try:
            os.write(self._mouth, b"!")
        except BlockingIOError:
            return  # it will, anyway

    # -- The thread ------------------------------------------------------------------------------

    def _attend(self) -> None:
        why = "it cannot take part"
        try:
            self._serve()
            why = self._why
        except BaseException as error:  # it is the loop's to hear of
            self._failure = error
        with self._changed:
            self._changed.notify_all()
            self.spoke.leave(why, time.monotonic())
        end_s = time.monotonic() + FAREWELL_S
        while self._turn() and self.spoke.pending and time.monotonic() < end_s:
            self._wait(min(self.spoke.due_s(), end_s) - time.monotonic())

    def _serve(self) -> None:
        spoke = self.spoke
        while not self._leaving:
            with self._changed:
                now_s = time.monotonic()
                self._listen(now_s)
                self._renew(now_s)
            due_s = self._turn()
            if spoke.fate is not None:
                raise spoke.fate
            if spoke.welcome is not None:
                with self._changed:
                    self._build(spoke.welcome)
                continue
            self._wait(due_s - time.monotonic())

    def _turn(self) -> float:
        """Read and send what there is; answers when there may be more to do."""
        spoke, now_s = self.spoke, time.monotonic()
        with self._changed:
            self._drain(wait=False)
            spoke.tick(now_s)
            self._send()
            if not self._alone:
                self._heard_s = now_s
            self._changed.notify_all()
            return spoke.due_s()

    def _build(self, welcome: Welcome) -> None:
        """Compare what the server described to what the loop has."""
        work = tomllib.loads(welcome.experiment)["work"]["name"]
        if work != "own-loop":
            raise ConfigError(
                f'the server at {self.endpoint} hands out jobs of another kind, work = "{work}"; '
                'for a training loop of your own it needs work = "own-loop(steps=50)"'
            )
        if (mine := manifest(self._kinds)) != welcome.manifest:
            raise ConfigError(
                f"the model is another than the server's: {mine} here, {welcome.manifest} there"
            )
        self.spoke.ready(self._kinds, time.monotonic(), self._shapes)
        log.info("%s is worker %d of %s", self.name, welcome.slot, self.endpoint)

    def _wait(self, seconds: float) -> None:
        if seconds <= 0 or int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            return
        waiting = [self._socket.fileno(), self._ear]
        if self._ear in select.select(waiting, [], [], min(seconds, WAIT_S))[0]:
            os.read(self._ear, 4096)
