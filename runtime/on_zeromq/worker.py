"""A worker process: a DEALER socket, the protocol whose bytes it moves, and what it computes.

One thread does both: while it computes, ZeroMQ's own thread takes in the next job, and a second
thread says over a connection of its own that the process is alive.
"""

import errno
import math
import os
import platform
import random
import signal
import sys
import threading
import time
import tomllib
import traceback
from importlib.metadata import version
from logging import WARNING
from pathlib import Path
from shlex import quote
from types import FrameType
from typing import Any

import zmq

from offbeat.runtime.base.errors import ComputeError, ConfigError, OffbeatError, Refused
from offbeat.runtime.base.logs import FIRST_S, REMIND_S, identify, tell
from offbeat.runtime.compute.backend import JobRequest, Runner
from offbeat.runtime.experiment.engines import Liveness
from offbeat.runtime.protocol.messages import Welcome, kinds
from offbeat.runtime.protocol.worker import WorkerProtocol
from offbeat.runtime.transport import keys, sockets
from offbeat.runtime.transport.metrics import Exporter
from offbeat.workers.tasks import device as devices

LEAVE_S = 10.0  # for the job or task at hand, once the process is asked to end
FAREWELL_S = 2.0  # for the server to hear that it leaves
MOST_HANDSHAKES = 5  # that fail in a row without a word of why


class Abandoned(BaseException):
    """What is at hand takes too long for a process that was asked to end."""


class Worker:
    """One worker.

    Args:
        endpoint: of the server.
        name: its own; of its key, where there are keys.
        folder: of keys, or None.
        device: where a torch task computes.
        most_wait_s: for a server, before giving up; None: for ever.
        metrics: where they are served; see ``metrics.address``; "": nowhere.

    Raises:
        ConfigError: no such device, no keys of that name, or an address that is none.
    """

    _apart = True  # whether pulses have a connection of their own

    def __init__(
        self,
        endpoint: str,
        name: str = "",
        folder: Path | None = None,
        device: str = "cpu",
        most_wait_s: float | None = None,
        metrics: str = "",
    ) -> None:
        if device != "cpu":
            devices.found(device)
        self.endpoint, self._device, self._most_wait_s = endpoint, device, most_wait_s
        self._waits_s: float | None = None  # since when
        self.own = keys.identity(folder, name) if folder is not None else None
        self._server_key = keys.server_key(folder) if folder is not None else b""
        where = f"{platform.node()[:32] or 'host'}:{os.getpid()}"
        nonce = random.SystemRandom().randrange(1, 2**52)
        self.name = self.own.name if self.own else name or f"{where}:{nonce % 16**4:04x}"
        identify(node=self.name)
        self.spoke = WorkerProtocol(
            self.name, nonce, version("offbeat"), where, time.monotonic(), sockets.PIECE_S
        )
        self._context = zmq.Context()
        self._leaving = False
        self._computing = False
        self._runner: Runner | None = None
        self._built = ""  # the experiment that the runner is for
        self._kinds: Any = None
        self._handshakes = 0  # failed since one succeeded
        self._unsent = False  # no connection, as the last message found, or the monitor told
        self._forgotten = False  # the server knew nothing of a pulse
        self._anew_s = -math.inf  # when the connection was begun anew
        self._stop = threading.Event()
        self._bytes_in = self._bytes_out = 0  # of whole messages
        self._spent = 0.0, 0  # seconds, jobs
        self._exporter: Exporter | None = None
        try:
            self._socket = self._connected()
            if self._apart:
                sockets.patient(self._socket)
            self._socket.rcvtimeo = round(1000 * self.spoke.liveness.tick_s)
            # What else there is to tell, libzmq would wait for somebody to read.
            told = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | sockets.FAILED
            self._monitor = self._socket.get_monitor_socket(told)
            sockets.connected(self._socket, endpoint)
            if metrics:
                self._exporter = Exporter(metrics, "worker")
        except BaseException:
            self._context.destroy(0)
            raise
        self._pulse = threading.Thread(target=self._pulsate, name="pulse", daemon=True)

    def _connected(self) -> zmq.Socket:
        socket = sockets.limited(self._context, zmq.DEALER, Liveness())
        if self.own is not None:
            keys.as_client(socket, self.own, self._server_key)
        return socket

    def run(self) -> None:
        """Work until the run is over, or the process is asked to end.

        Raises:
            Refused: the server does not let it in; Fenced: another process took its place;
            ConfigError: it cannot build the task, or builds another one than the server's.
        """
        before = {n: signal.signal(n, self._asked) for n in (signal.SIGTERM, signal.SIGINT)}
        before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._alarm)
        self._pulse.start()
        try:
            self._work()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.close()

    def close(self) -> None:
        """Let go of the sockets; may be called twice."""
        self._stop.set()
        if self._pulse.is_alive():
            self._pulse.join()
        if self._exporter is not None:
            self._exporter.close()
            self._exporter = None
        self._context.destroy(sockets.LINGER_MS)

    # -- The loop --------------------------------------------------------------------------------

    def _work(self) -> None:
        spoke, tick_s = self.spoke, 0.0
        while True:
            self._drain(wait=not spoke.orders or spoke.clogged)
            if (now_s := time.monotonic()) >= tick_s:
                tick_s = now_s + spoke.liveness.tick_s
                self._socket.rcvtimeo = round(1000 * spoke.liveness.tick_s)
                self._listen(now_s)
                self._renew(now_s)
                spoke.tick(now_s)
                if self._exporter is not None:
                    self._exporter.show(self.status())
                if self._alone:
                    self._await(now_s)
                else:
                    self._waits_s = None
            self._send()
            if spoke.fate is not None:
                raise spoke.fate
            if spoke.state == "over":
                tell("ended", spoke.why, reason=spoke.why)
                return
            if self._leaving:
                tell("ended", "it was asked to leave", reason="interrupted")
                self._leave("it was asked to leave")
                return
            if spoke.welcome is not None:
                try:
                    self._build(spoke.welcome)
                except ConfigError as error:  # its place is free for one that can
                    self._leave(str(error))
                    raise
            elif not spoke.clogged and (order := spoke.take()) is not None:
                self._compute(order)  # all of the last result is ZeroMQ's by now
                self._send()

    def status(self) -> dict[str, Any]:
        """How it goes, for metrics."""
        spoke = self.spoke
        return {
            "node": self.name,
            "run": spoke.run,
            "incarnation": spoke.incarnation,
            "jobs": self._spent[1],
            "spent_s": list(self._spent),
            "orders": len(spoke.orders),
            "bytes_in": self._bytes_in,
            "bytes_out": self._bytes_out,
            "counts": dict(spoke.counts),
        }

    @property
    def _alone(self) -> bool:
        """Whether no server is there: none was found yet, it said that it stops, or it is gone."""
        return self.spoke.state == "calling" or self._unsent

    def _await(self, now_s: float) -> None:
        """Say what is waited for, where there is no server, and give up in the end."""
        if self._waits_s is None:
            self._waits_s, self._remind_s, self._said = now_s, now_s + FIRST_S, ""
        if self._most_wait_s is not None and now_s - self._waits_s > self._most_wait_s:
            raise ComputeError(
                f"no server at {self.endpoint} for {self._most_wait_s:.0f} s{self._lack()}; is it "
                "running?"
            )
        if now_s >= self._remind_s or self.spoke.last_said != self._said:
            self._remind_s, self._said = now_s + REMIND_S, self.spoke.last_said
            lack = self._lack() or ": nobody answers there"
            text = f"waiting for the server at {self.endpoint}{lack}"
            tell("waiting", text, WARNING, here=[])

    def _lack(self) -> str:
        """Why nothing comes of the server, as far as is known."""
        said = self.spoke.last_said
        if not said and self._alone:
            said = sockets.unknown(self.endpoint)
        return f": {said}" if said else ""

    def _drain(self, wait: bool) -> None:
        """Read what is there, or ``wait`` for it until the next tick."""
        spoke = self.spoke
        for count in range(sockets.QUEUED):
            block = wait and not count
            frames = sockets.receive(self._socket, block)
            if frames is None:
                return
            self._bytes_in += sockets.size(frames)
            spoke.receive(frames, time.monotonic())
            if spoke.outbox:
                self._send()  # acknowledgements keep the other side's window open
            if block and spoke.orders:
                return  # the rest can wait, the job should not

    def _send(self) -> None:
        if not self.spoke.outbox:
            return
        outbox, self.spoke.outbox = self.spoke.outbox, []
        for frames in outbox:
            try:
                sockets.send(self._socket, frames)
                self._bytes_out += sockets.size(frames)
                self._unsent = False
            except zmq.Again:
                self._unsent = True  # no connection; the link sends it again
                self.spoke.counts["unsent"] += 1

    def _build(self, welcome: Welcome) -> None:
        """Make the task that the server described."""
        if self._runner is None or self._built != welcome.experiment:
            self._computing = True  # as a job: it may take long
            try:
                self._runner, self._kinds = built(welcome.experiment, self._device)
            except Abandoned:
                return
            finally:
                self._computing = False
            self._built = welcome.experiment
            if getattr(self._runner.task, "apart", False):  # models come into memory it copies from
                self.spoke.pool.make = self._runner.task.memory  # type: ignore[attr-defined]
        now_s = time.monotonic()
        if self.spoke.welcome is welcome:
            self.spoke.ready(self._kinds, now_s)
            identify(run=self.spoke.run, incarnation=self.spoke.incarnation)
            text = f"{self.name} is worker {welcome.slot} of {self.endpoint}"
            tell("joined", text, server=self.endpoint, worker=welcome.slot)

    def _compute(self, order: JobRequest) -> None:
        assert self._runner is not None
        self._computing = True
        try:
            (answer,) = self._runner.compute([order])
        except Abandoned:
            return
        except Exception:
            self.spoke.failed(order, traceback.format_exc(), time.monotonic())
        else:
            self._spent = self._spent[0] + answer.spent_s, self._spent[1] + 1
            self.spoke.answer(order, answer, time.monotonic())
        finally:
            self._computing = False

    # -- Ends ------------------------------------------------------------------------------------

    def _asked(self, number: int, frame: FrameType | None) -> None:
        """SIGTERM or SIGINT: finish the job at hand, or hand it back; a second one ends at once."""
        if self._leaving:
            raise KeyboardInterrupt
        self._leaving = True
        signal.setitimer(signal.ITIMER_REAL, LEAVE_S)

    def _alarm(self, number: int, frame: FrameType | None) -> None:
        if self._computing:
            raise Abandoned

    def _leave(self, why: str) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        end_s = time.monotonic() + FAREWELL_S
        self.spoke.leave(why, time.monotonic())
        while self.spoke.pending and time.monotonic() < end_s:
            self.spoke.tick(time.monotonic())
            self._send()
            self._drain(wait=True)

    def _renew(self, now_s: float) -> None:
        """Connect anew where the server is there, but has given this worker up.

        It is what TCP may take long to find out after a partition.
        """
        if self._forgotten and now_s - self._anew_s > sockets.CONNECT_MS / 1000:
            self._forgotten, self._anew_s = False, now_s
            self._socket.disconnect(self.endpoint)
            sockets.connected(self._socket, self.endpoint)

    def _listen(self, now_s: float) -> None:
        """What the socket's monitor says of new connections, or that the worker is not let in.

        Raises:
            Refused: it makes no sense to knock again.
        """
        for event, value in sockets.told(self._monitor):
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._handshakes, self._unsent = 0, False
                self.spoke.lost(now_s)
            elif event == zmq.EVENT_DISCONNECTED:
                self._unsent = True
            elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH and self.own is not None:
                raise Refused(
                    "this node's key is not in the run's list; at the server, run: "
                    f"offbeat keys authorize {self.name} {quote(self.own.public.decode())}"
                )
            elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                raise Refused(
                    f"the server at {self.endpoint} has no keys; leave --keys out, if that is right"
                    if self.own
                    else f"the server at {self.endpoint} wants keys; give --keys FOLDER"
                )
            elif event & sockets.FAILED and self.own is not None and value == errno.EPIPE:
                self._handshakes += 1  # it hung up, without a word of why
                if self._handshakes >= MOST_HANDSHAKES:
                    raise Refused(
                        f"the server at {self.endpoint} has another key than the one in "
                        f"{keys.AUTHORIZED}/{keys.SERVER}.key"
                    )

    def _pulsate(self) -> None:
        """Say that the process is alive, whatever its main thread is busy with."""
        with self._connected() as socket:
            socket.linger = 0
            sockets.connected(socket, self.endpoint)
            while not self._stop.wait(self.spoke.liveness.heartbeat_s):
                if (frames := self.spoke.pulse) is not None:
                    try:
                        socket.send_multipart(frames, zmq.NOBLOCK)
                    except zmq.Again:
                        continue  # no connection: there is nobody to tell
                while socket.poll(0):
                    socket.recv_multipart()
                    self._forgotten = True


def built(text: str, device: str) -> tuple[Runner, Any]:
    """What computes the jobs of the experiment in ``text``, and the messages it needs."""
    from offbeat.runtime.experiment.experiment import from_table

    table = tomllib.loads(text)
    if table["work"]["name"] == "own-loop":
        raise ConfigError(
            "the jobs of this run are steps of training loops; join it from one, with offbeat.join"
        )
    try:
        (experiment,) = from_table(table)
    except OffbeatError as error:
        raise ConfigError(f"the server's experiment cannot be built here: {error}") from None
    task = devices.placed(experiment.task, device)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    x = task.initial(experiment.seed)
    return Runner(task, experiment.work), kinds(x, experiment.work.keep(1, x))
