"""The compute backend of machines: a ROUTER socket, and the protocol whose bytes it moves.

The socket is drained on its own descriptor, in the run's thread: no other loop, no queue between
threads.  While the run evaluates or saves, messages wait in the socket.
"""

import select
import time
from collections.abc import Sequence
from importlib.metadata import version
from logging import WARNING, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zmq

from offbeat.runtime.base import shapes
from offbeat.runtime.base.errors import ComputeError, ConfigError
from offbeat.runtime.base.logs import FIRST_S, REMIND_S, Seldom, identify, tell
from offbeat.runtime.base.registry import MADE_BY_HAND
from offbeat.runtime.base.tensors import finite
from offbeat.runtime.compute.backend import (
    Back,
    ComputeBackend,
    ComputeEvent,
    Gone,
    JobRequest,
    JobResult,
)
from offbeat.runtime.experiment.engines import Liveness
from offbeat.runtime.protocol.messages import kinds
from offbeat.runtime.protocol.server import SERVER, ServerProtocol
from offbeat.runtime.run import checkpoint
from offbeat.runtime.run.checkpoint import write_whole
from offbeat.runtime.run.claim import Claim
from offbeat.runtime.transport import keys, sockets
from offbeat.runtime.transport.guard import Guard, needs
from offbeat.runtime.transport.metrics import Exporter
from offbeat.runtime.transport.nursery import Nursery
from offbeat.workers.tasks.external import ELSEWHERE, External
from offbeat.workers.work import OwnLoop

if TYPE_CHECKING:
    from offbeat.runtime.experiment.engines import Zmq
    from offbeat.runtime.experiment.experiment import Experiment

log = getLogger("offbeat.net")
AT_ONCE = 256  # messages that are read before anything else is looked at
LATE = 2  # ticks that the clock may wait for the end of what is there to be read
WAIT_S = 0.5  # for the first loop, before signals are looked at
FIRST = 2**52  # serial of the job that asks for a model; no run has so many
START_S = 60.0  # for the workers of this machine to be there
GOODBYE_S = 1.0  # for members to hear that the server stops,
FAREWELL_S = 60.0  # or that the run is over: one that computes, and lives, hears it afterwards


class ZmqBackend(ComputeBackend):
    """Workers on this and other machines, over ZeroMQ.

    Args:
        experiment: what they compute.
        options: see ``engines.zmq``.
        folder: of the run.

    Raises:
        ConfigError: the task cannot be sent as text; the address cannot be had, or not without
            keys.
        Fenced: another server runs this folder.
        Refused: keys are not checked.
    """

    def __init__(self, experiment: "Experiment", options: "Zmq", folder: Path | None) -> None:
        liveness = Liveness(options.suspect_after_s)
        folder_of_keys = Path(options.keys).expanduser() if options.keys else None
        keys.check_bind(options.bind, folder_of_keys)
        text = _portable(experiment)
        x = experiment.task.initial(experiment.seed)
        spoken = kinds(x, experiment.work.keep(1, x))
        self._nursery: Nursery | None = None
        self._gate: keys.Gate | None = None
        self._exporter: Exporter | None = None
        self._told = Seldom()
        self._done = False
        self._claim = Claim(folder)
        identify(run=self._claim.run, node=SERVER, incarnation=self._claim.incarnation)
        self._context = zmq.Context()
        self._guard = Guard(
            self._context,
            needs(spoken),
            experiment.fleet.workers,
            liveness.heartbeat_s,
            keyed=folder_of_keys is not None,
        )
        try:
            self._socket = sockets.limited(self._context, zmq.ROUTER, liveness)
            sockets.patient(self._socket)
            if folder_of_keys is not None:
                own = keys.identity(folder_of_keys, keys.SERVER)
                self._gate = keys.Gate(self._context, folder_of_keys)
                keys.as_server(self._socket, own)
            self._descriptor = self._socket.fileno()  # to ask for it takes as long as a message
            self._hub = ServerProtocol(
                self._claim.run,
                text,
                spoken,
                experiment.fleet.workers,
                self._claim.incarnation,
                liveness,
                version("offbeat"),
                sockets.PIECE_S,
            )
            if options.metrics:
                self._exporter = Exporter(options.metrics, SERVER)
            self._guard.watch(self._socket, sockets.FAILED)
            self.endpoint = sockets.bound(self._socket, options.bind)
            self._guard.start()
            self._own_knocks = 0
            if self._gate is not None:
                self._gate.self_test(keys.knock(self.endpoint), own.public)
                self._own_knocks = 1  # of the handshakes that were refused
            now_s = time.monotonic()
            self._tick_s = self._look_s = now_s
            self._alone_s, self._remind_s = now_s, now_s + FIRST_S  # since when nobody is here
            self._most_idle_s = options.most_idle_s
            self._frames: list[Any] = []  # of the message that is being read
            text = f"server {self._claim.incarnation} listens at {self.endpoint}"
            tell("listens", text, endpoint=self.endpoint)
            self._meet_all(experiment, options, folder)
        except BaseException:
            self.close()
            raise

    def _meet_all(self, experiment: "Experiment", options: "Zmq", folder: Path | None) -> None:
        """Begin workers of this machine, and let the run begin when they, or a loop, are there."""
        slots = experiment.fleet.workers
        loops = isinstance(experiment.work, OwnLoop)
        count = options.processes
        if count and loops:
            raise ConfigError(f"processes = {count}: {ELSEWHERE}")
        if count is None:
            count = 0 if loops else slots
        if count:
            words = (keys.knock(self.endpoint), str(count), options.keys)
            self._nursery = Nursery("worker", *words)
            self._await_all(min(count, slots))
        if loops:
            self._meet(experiment, folder)

    def _await_all(self, count: int) -> None:
        """Let the run begin when the workers of this machine are there."""
        hub, end_s, here = self._hub, time.monotonic() + START_S, set[int]()
        absent, hub.events = hub.events, []
        while len(here) < count and time.monotonic() < end_s:
            for event in self.collect(sockets.LINGER_MS / 1000):
                (here.add if isinstance(event, Back) else here.discard)(event.worker)  # type: ignore[union-attr]
        hub.events = [event for event in absent if event.worker not in here]  # type: ignore[union-attr]

    def _meet(self, experiment: "Experiment", folder: Path | None) -> None:
        """Let the run begin when it is known what the loops' model is, and where it begins."""
        hub, task, path = self._hub, experiment.task, folder and folder / shapes.FILE
        hub.dim = len(task.initial(experiment.seed))
        known = task.start is not None if isinstance(task, External) else True
        if isinstance(task, External) and task.shapes:
            hub.shapes = shapes.write(task.shapes)
        if path is not None and path.exists() and checkpoint.exist(path.parent / "checkpoint"):
            hub.shapes, known = path.read_text(), True
        absent, hub.events, here = hub.events, [], set[int]()
        asked: int | None = None
        while not hub.shapes or not known:
            for event in self.collect(WAIT_S):
                if isinstance(event, Back):
                    here.add(event.worker)
                elif isinstance(event, Gone):
                    here.discard(event.worker)
                    asked = None if asked == event.worker else asked
                elif isinstance(event, JobResult) and not known:
                    assert isinstance(task, External)
                    assert not isinstance(event.payload, bytes)
                    if known := finite(event.payload):
                        task.begin(task.initial(experiment.seed) - event.payload)
                    else:
                        log.warning(
                            "the model of worker %s is not finite; waiting for another loop", asked
                        )
            if not known and asked is None and here:  # a job of no steps asks for its model
                asked = min(here)
                x = task.initial(experiment.seed)
                self.submit(JobRequest(FIRST, asked, asked, 0, 0, 0, x, None))
        hub.events = [event for event in absent if event.worker not in here]  # type: ignore[union-attr]
        if isinstance(task, External):
            task.arrange(shapes.read(hub.shapes))
        if path is not None:
            write_whole(path, hub.shapes.encode())

    # -- ComputeBackend ------------------------------------------------------------------------

    def submit(self, order: JobRequest) -> None:
        self._hub.submit(order, time.monotonic())
        self._send()

    def cancel(self, serial: int) -> None:
        self._hub.cancel(serial, time.monotonic())
        self._send()

    def collect(self, timeout_s: float) -> Sequence[ComputeEvent]:
        hub, descriptor = self._hub, [self._descriptor]
        end_s = time.monotonic() + timeout_s
        while True:
            empty = self._drain()
            # What was not acknowledged is sent again only once all that came has been read; but
            # who never stops talking does not stop the clock.
            if (now_s := time.monotonic()) >= self._tick_s + (
                0 if empty else LATE * hub.liveness.tick_s
            ):
                self._tick(now_s)
            if hub.events:
                self._send()
                events, hub.events = hub.events, []
                return events
            if now_s >= end_s:
                self._send()
                return []
            if hub.outbox:
                self._send()  # and look again: while it sends, ZeroMQ may learn of what came
            elif (left_s := min(end_s, self._tick_s) - time.monotonic()) > 0:
                select.select(descriptor, [], [], left_s)

    def saving(self) -> None:
        """See ``ComputeBackend``: a server that slept may have been replaced unseen."""
        self._claim.check()

    def ended(self, reason: str) -> None:
        self._done = reason != "interrupted"

    def close(self) -> None:
        if self._context.closed:
            return
        if hasattr(self, "_hub"):
            self._part()
        if self._nursery is not None:
            self._nursery.close()
        if self._exporter is not None:
            self._exporter.close()
        if self._gate is not None:
            self._gate.close()
        self._guard.close()
        self._context.destroy(sockets.LINGER_MS)
        self._claim.close()

    def _part(self) -> None:
        """Tell everybody that it is over, and wait a moment for them to have heard it."""
        waits = self._done and self._nursery is None  # its workers are ended anyway
        hub, end_s = self._hub, time.monotonic() + (FAREWELL_S if waits else GOODBYE_S)
        hub.over("the run is over" if self._done else "the server stops", self._done, end_s)
        while hub.pending() and time.monotonic() < end_s:
            self._send()
            self._socket.poll(20)
            self._drain()
            hub.tick(time.monotonic())
        self._send()

    # -- Bytes -----------------------------------------------------------------------------------

    def _drain(self) -> bool:
        """Read what is there; answers whether that was all."""
        socket, hub, guard = self._socket, self._hub, self._guard
        for _ in range(AT_ONCE):
            if (address := sockets.sender(socket)) is None:
                guard.drained()
                return True
            frames = sockets.receive(socket)
            assert frames is not None  # the address is never alone
            nbytes = sockets.size(frames)
            hub.bytes_in += nbytes
            one = guard.came(socket, address, frames, nbytes)
            if one is not None and one.cut:
                continue  # what else it had said
            node = None if self._gate is None else self._gate.who(frames[0])
            blame = hub.receive(address, node, frames, time.monotonic())
            if hub.outbox:
                self._send()  # acknowledgements keep the other side's window open
            if one is not None and (blame or one.wrong or not one.heard):
                guard.judge(one, node, blame)
            if hub.cuts:
                guard.cut(hub.cuts)
        return False

    def _send(self) -> None:
        hub, socket = self._hub, self._socket
        if not hub.outbox:
            return
        posts, hub.outbox = hub.outbox, []
        for address, frames in posts:
            try:
                sockets.send(socket, [address, *frames])
                hub.bytes_out += sockets.size(frames)
            except zmq.Again:
                hub.counts["slow"] += 1  # its queue is full; the link sends it again
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                hub.counts["unreachable"] += 1

    # -- Time ------------------------------------------------------------------------------------

    def _tick(self, now_s: float) -> None:
        hub = self._hub
        hub.tick(now_s)
        self._tick_s = now_s + hub.liveness.tick_s
        for note in hub.notes:
            self._told.tell(note.event, note.text, note.level, **note.fields)
        hub.notes.clear()
        self._told.remind()
        hub.cuts.clear()
        if now_s < self._look_s:
            return
        self._look_s = now_s + hub.liveness.heartbeat_s
        self._look_around()
        if self._exporter is not None:
            self._exporter.show(hub.status(now_s))
        self._claim.check(surely=False)
        if self._gate is not None:
            for node in self._gate.revoked():
                tell("key_revoked", f"the key of {node} is not listed any more", member=node)
                hub.revoke(node)
        if self._nursery is not None:
            self._nursery.check()
        self._await(now_s)

    def _look_around(self) -> None:
        """What the guard has to tell."""
        guard = self._guard
        count = sum(bool(event & sockets.FAILED) for _, event, _ in guard.heard())
        own = min(count, self._own_knocks)
        self._own_knocks -= own
        if count := count - own:
            self._hub.counts["handshakes_refused"] += count
            text = f"{count} handshakes were refused"
            self._told.tell("key_refused", text, count=count)
        for peer, why in guard.ends():
            self._hub.counts["cut"] = guard.ended
            text = f"a connection from {peer} is ended: {why}"
            self._told.tell("cut", text, WARNING, address=peer, why=why)

    def _await(self, now_s: float) -> None:
        """Say what is waited for, where nobody is here."""
        if self._hub.seats:
            self._alone_s, self._remind_s = now_s, now_s + FIRST_S
            return
        if self._most_idle_s is not None and now_s - self._alone_s > self._most_idle_s:
            raise ComputeError(
                f"no worker has been here for {self._most_idle_s:.0f} s; let some join with "
                f"offbeat join {self.endpoint}, and go on with the run"
            )
        coming = self._nursery is not None and now_s - self._alone_s < REMIND_S
        if now_s >= self._remind_s and not coming:
            self._remind_s = now_s + REMIND_S
            text = f"waiting for workers; let some join with: offbeat join {self.endpoint}"
            tell("waiting", text, WARNING, here=[])


def _portable(experiment: "Experiment") -> str:
    """The experiment's text, from which a worker can make it again."""
    for key in ("task", "work"):
        spec = getattr(experiment, key).spec
        if spec is None or not spec.portable():
            raise ConfigError(
                f'engine = "zmq": the {key} was made by hand ({MADE_BY_HAND}...), and workers '
                "elsewhere could not make it again; register it, and give its name"
            )
    return experiment.toml()
