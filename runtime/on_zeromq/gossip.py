"""Peers on this machine, watched: ``offbeat run`` of a gossip method with ``engine = "zmq"``.

They are the processes that ``offbeat peer`` starts, and speak to one another alone.  Who began them
asks each what it did since it was asked last, and says how far it may go; one that dies is begun
again, and its neighbours take it back.
"""

import json
import math
import shutil
import tempfile
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zmq

from offbeat.runtime.base import errors, trees
from offbeat.runtime.base.errors import ComputeError, ConfigError, StorageError
from offbeat.runtime.experiment.engines import Liveness
from offbeat.runtime.gossip.driver import LOOK_S, GossipDriver, Slot
from offbeat.runtime.gossip.hosted import NodeReport
from offbeat.runtime.protocol.messages import WATCHING, Told, Watch
from offbeat.runtime.protocol.wire import Reader, pack, parcels
from offbeat.runtime.run import checkpoint
from offbeat.runtime.run.records import Records
from offbeat.runtime.transport import sockets
from offbeat.runtime.transport.nursery import Nursery

if TYPE_CHECKING:
    from offbeat.runtime.experiment.engines import Zmq
    from offbeat.runtime.experiment.experiment import Experiment

START_S = 120.0  # for all peers to be there
WATCH_S = 0.05  # between two questions to a peer
ASK_S = 2.0  # without an answer, a question is asked again
MOST_REPORT = 2**34  # bytes
PLAN = "plan.json"
WATCHER = "watcher"


def planned(folder: Path) -> tuple[list[str], Callable[[str], object]]:
    """The names of the peers that ``folder`` has a plan for, and what runs one of them."""
    from offbeat.runtime.experiment.experiment import read
    from offbeat.runtime.on_zeromq.alike import PeerAddress
    from offbeat.runtime.on_zeromq.peer import PeerProcess
    from offbeat.runtime.on_zeromq.policies import Driven

    plan, file = json.loads((folder / PLAN).read_text()), folder / "experiment.toml"
    device = tomllib.loads(file.read_text())["task"].get("device", "cpu")
    # Read once for all, but where it would begin CUDA: what is forked after that cannot use it.
    shared = read(file) if device == "cpu" else None
    seats = [PeerAddress(*seat) for seat in plan["seats"]]
    names = [seat.name for seat in seats]

    def run(name: str) -> None:
        (experiment,) = shared or read(file)
        PeerProcess(
            experiment,
            seats,
            names.index(name),
            folder / name,
            suspect_after_s=plan["suspect_after_s"],
            policy=Driven,
        ).run()

    return names, run


class PeerSlot(Slot):
    """A peer, and the socket over which it is asked."""

    def __init__(self, number: int, name: str, socket: zmq.Socket) -> None:
        super().__init__([number])
        self.name, self.socket = name, socket
        self.commands: list[list[Any]] = []  # to go with the next question
        self.asked: list[Any] | None = None  # the question that has no answer yet
        self.question, self.asked_s = 0, -math.inf
        self.data = bytearray()  # of the answer that is coming
        self.incarnation = 0
        self.began = False

    @property
    def here(self) -> bool:
        return self.began


class ZmqGossip(GossipDriver[PeerSlot]):
    """A gossip run of peer processes.

    Args:
        experiment: what to run.
        options: see ``engines.zmq``.
        records: where everything is written.
        around: see ``Loop``, and the seed.

    Raises:
        ConfigError: the experiment cannot be sent as text, or wants more than this machine.
    """

    def __init__(
        self, experiment: "Experiment", options: "Zmq", records: Records, **around: Any
    ) -> None:
        from offbeat.runtime.on_zeromq.alike import PeerAddress, lines

        n = experiment.fleet.workers
        if options.keys or not options.bind.startswith("tcp://127.0.0.1:"):
            raise ConfigError(
                "offbeat run starts all peers of a gossip method on this machine, where they need "
                "no keys; on several machines, start each with offbeat peer"
            )
        if options.metrics:
            raise ConfigError("peers serve metrics each for itself: see offbeat peer --metrics")
        if options.processes not in (None, n):
            raise ConfigError(f"a gossip run has a process for each of its {n} nodes")
        self._liveness, self._nursery = Liveness(options.suspect_after_s), None
        names = [f"node-{i}" for i in range(n)]
        self._folder = Path(tempfile.mkdtemp(prefix="offbeat-"))
        self._context = zmq.Context()
        try:
            seats = [PeerAddress(name, f"ipc://{self._folder}/{name}.ipc") for name in names]
            lines(experiment, seats)
            plan = {"seats": seats, "suspect_after_s": options.suspect_after_s}
            (self._folder / PLAN).write_text(json.dumps(plan))
            (self._folder / "experiment.toml").write_text(experiment.toml())
            chairs = [
                PeerSlot(i, seat.name, self._connected(seat.endpoint))
                for i, seat in enumerate(seats)
            ]
            super().__init__(experiment, chairs, records, **around)
        except BaseException:
            self.close()
            raise
        self._reader = Reader("", WATCHING)
        self._poller = zmq.Poller()
        for chair in self._seats:
            self._poller.register(chair.socket, zmq.POLLIN)
        self._check_s = 0.0

    _nursery: Nursery | None

    def _connected(self, endpoint: str) -> zmq.Socket:
        socket = sockets.limited(self._context, zmq.DEALER, self._liveness)
        socket.linger, socket.immediate = 0, 0
        socket.reconnect_ivl_max = 500
        sockets.connected(socket, endpoint)
        return socket

    def _launch(self, states: Mapping[int, dict[str, Any]] | None, now_s: float) -> None:
        for i, state in (states or {}).items():
            folder = self._folder / self._seats[i].name
            folder.mkdir()
            standing = {"step": self.step, "time_s": now_s, "records": {"flushed": 0}}
            checkpoint.write(folder / "checkpoint", 0, {"node": state, **standing})
            (folder / "exact").touch()
        self._nursery = Nursery("peer", str(self._folder))
        end_s = time.monotonic() + START_S
        while not all(chair.here for chair in self._seats):
            if time.monotonic() > end_s:
                absent = [chair.name for chair in self._seats if not chair.here]
                raise ComputeError(f"{', '.join(absent[:4])} did not start within {START_S:.0f} s")
            self._listen(LOOK_S)
        self._zero_s = time.monotonic() - now_s * self.experiment.pace
        self._rest()

    # -- Questions and answers -------------------------------------------------------------------

    def _listen(self, timeout_s: float) -> None:
        end_s = time.monotonic() + timeout_s
        while True:
            now_s = time.monotonic()
            for chair in self._seats:
                self._question(chair, now_s)
            ready = self._poller.poll(max(1, round(1000 * min(WATCH_S, end_s - now_s))))
            answered = [chair for chair in self._seats if (chair.socket, zmq.POLLIN) in ready]
            for chair in answered:
                self._read(chair)
            if now_s >= self._check_s:
                self._check_s = now_s + self._liveness.heartbeat_s
                if self._nursery is not None:
                    self._nursery.check()
            if answered or now_s >= end_s:
                break
        self._arrive()

    def _question(self, chair: PeerSlot, now_s: float) -> None:
        if chair.asked is None:
            if now_s < chair.asked_s + WATCH_S and not chair.commands:
                return
            chair.question += 1
            commands, chair.commands = chair.commands, []
            (parcel,) = parcels("watch", Watch(chair.question, json.dumps(commands)))
            chair.asked = pack(parcel, run="", node=WATCHER, incarnation=0)
        elif now_s < chair.asked_s + ASK_S:
            return
        chair.asked_s = now_s
        with suppress(zmq.Again):
            chair.socket.send_multipart(chair.asked, zmq.NOBLOCK)

    def _read(self, chair: PeerSlot) -> None:
        with suppress(zmq.Again):
            while True:
                frames = chair.socket.recv_multipart(zmq.NOBLOCK, copy=False)
                message = self._reader.read([frame.buffer for frame in frames])
                told = message.body
                if not isinstance(told, Told) or told.question != chair.question:
                    continue
                if told.offset == 0:
                    chair.data.clear()
                part = message.arrays["part"]
                if told.offset != len(chair.data) or part is None:
                    continue
                chair.data += part.data
                if len(chair.data) > MOST_REPORT:
                    raise ComputeError(f"{chair.name} reports more than {MOST_REPORT} bytes")
                if told.last and chair.asked is not None:
                    chair.asked = None
                    self._reported(chair, trees.load(None, trees.loads(bytes(chair.data))))

    def _reported(self, chair: PeerSlot, fields: dict[str, Any]) -> None:
        incarnation, began = fields.pop("incarnation"), fields.pop("began")
        if incarnation != chair.incarnation:
            if chair.began:
                self._replaced(chair)
            chair.incarnation, chair.began = incarnation, False
        if not began:
            return
        if not chair.began and chair.replaced:
            chair.commands, chair.limits = [["extend", self._limit]], 1
            self.records.event({"event": "back", "worker": chair.nodes[0]}, self._clock_s())
        chair.began = True
        told = NodeReport()
        vars(told).update(fields)
        told.rows = [tuple(row) for row in fields["rows"].tolist()]
        if fields["error"] is not None:
            name, said = fields["error"]
            told.error = getattr(errors, name, ComputeError), said
        self._take(chair, told)

    def _replaced(self, chair: PeerSlot) -> None:
        """Another process speaks as this node."""
        i, now_s = chair.nodes[0], self._clock_s()
        self.records.event({"event": "gone", "worker": i, "why": "its process died"}, now_s)
        self._rounds.pop(i, None)
        if not self._bears:
            name = self.method.spec.name if self.method.spec else type(self.method).__name__
            raise ComputeError(
                f"the process of node {i} died, and {name} cannot go on without it; resume the run "
                "from its last checkpoint"
            )
        self.restarts += 1
        chair.replaced += 1
        chair.told = NodeReport()

    def _ask(self, what: str) -> dict[int, Any]:
        self._questions += 1
        question, asked = self._questions, [chair for chair in self._seats if chair.here]
        who = [(chair, chair.replaced) for chair in asked]
        for chair in asked:
            chair.commands.append(["ask", question, what])
        self._await(
            lambda: all(question in c.answers or c.replaced != times for c, times in who), "answer"
        )
        return {i: x for c in asked for i, x in c.answers.pop(question, {}).items()}

    def _tell(self, seats: Sequence[PeerSlot], what: str, each: Sequence[Any]) -> None:
        for chair in seats:
            if chair.here:
                chair.commands += [[what, argument] for argument in each]

    def close(self) -> None:
        """See ``Loop``: the peers, and their folder."""
        if self._context.closed:
            return
        if self._nursery is not None:
            self._nursery.close()
        self._context.destroy(0)
        try:
            shutil.rmtree(self._folder)
        except OSError as error:
            raise StorageError(
                f"{self._folder}: cannot be removed ({error.strerror}); nothing in it is needed"
            ) from None
