"""What a process bears of those who talk to it: counted by the byte, few at a time."""

import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack

import numpy as np
import pytest
import zmq

from offbeat.runtime.base.errors import Refused
from offbeat.runtime.experiment.engines import Liveness
from offbeat.runtime.protocol import messages as say
from offbeat.runtime.protocol import wire
from offbeat.runtime.protocol.channel import ReliableChannel
from offbeat.runtime.protocol.roster import GRAVE, MOST_OFFENCES, MOST_WRONG
from offbeat.runtime.transport import guard, keys, sockets
from offbeat.runtime.transport.guard import Guard

LIMIT_S = 20.0
NEEDS = 2**16
SIZES = (0, 1, 33, 34, 222, 223, 255, 256, 300, 9000, 70_000)


def until(condition):
    end_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end_s, "it did not happen in time"
        time.sleep(0.005)


class Place:
    """A guarded socket, and whoever talks to it."""

    def __init__(self, stack, folder=None, heartbeat_s=0.25):
        self.stack, self.folder = stack, folder
        self.context = stack.enter_context(zmq.Context())
        self.router = stack.enter_context(sockets.limited(self.context, zmq.ROUTER, Liveness()))
        if folder is not None:
            gate = keys.Gate(self.context, folder)
            stack.callback(gate.close)
            keys.as_server(self.router, keys.identity(folder, keys.SERVER))
        self.guard = Guard(self.context, NEEDS, 2, heartbeat_s, keyed=folder is not None)
        stack.callback(self.guard.close)
        self.guard.watch(self.router, 0)
        self.endpoint = sockets.bound(self.router, "tcp://127.0.0.1:*")
        self.guard.start()

    def dealer(self, name="a"):
        made = self.stack.enter_context(self.context.socket(zmq.DEALER))
        made.linger = 0
        if self.folder is not None:
            keys.as_client(made, keys.identity(self.folder, name), keys.server_key(self.folder))
        made.connect(self.endpoint)
        return made

    def raw(self):
        port = int(self.endpoint.rpartition(":")[2])
        made = self.stack.enter_context(socket.create_connection(("127.0.0.1", port), LIMIT_S))
        made.settimeout(LIMIT_S)
        return made

    def read(self, judge=0):
        """The next message; answers over which connection it came."""
        assert self.router.poll(LIMIT_S * 1000)
        address, frames = sockets.sender(self.router), sockets.receive(self.router)
        one = self.guard.came(self.router, address, frames, sockets.size(frames))
        if one is not None and judge is not None:
            self.guard.judge(one, "a" if self.folder else None, judge)
        return one


@pytest.fixture
def stack():
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def folder(tmp_path):
    for name in (keys.SERVER, "a"):
        keys.new(tmp_path, name)
        keys.authorize(tmp_path, name, keys.show(tmp_path, name))
    return tmp_path


def open_(made):
    """Whether the other side has not hung up; its greeting is read over."""
    made.setblocking(False)
    try:
        while made.recv(4096):
            pass
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


@pytest.mark.parametrize("keyed", [False, True])
def test_bytes_are_counted_to_the_last_one(stack, folder, keyed):
    place = Place(stack, folder if keyed else None)
    dealer = place.dealer()
    dealer.send(b"first")
    one = place.read()
    began = time.monotonic()
    time.sleep(0.1)
    one.look(time.monotonic(), rate=1e9)  # the handshake is no message
    besides = one.received - one.read
    for size in SIZES:
        dealer.send_multipart([bytes(size)] * 3)
        assert place.read() is one
    one.look(time.monotonic(), rate=0.0)
    assert one.received > 3 * sum(SIZES)
    beats = 100 * (1 + (time.monotonic() - began) / 0.5)  # of ZeroMQ's own
    assert 0 <= one.received - one.read - besides <= beats


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL".ljust(55, b"\0")
READY = b"\x05READY\x0bSocket-Type" + (6).to_bytes(4) + b"DEALER"


def test_a_message_that_does_not_end_is_cut_and_honest_ones_are_read(stack):
    place = Place(stack)
    honest = place.dealer()
    honest.send(b"first")
    one = place.read()
    mallory = place.raw()
    mallory.sendall(GREETING + bytes([4, len(READY)]) + READY)
    said = b""
    while b"READY" not in said:
        said += mallory.recv(4096)
    part = b"\x01\xc8" + bytes(200)  # more will follow
    for _ in range(2 * (NEEDS + guard.BESIDES) // len(part)):
        try:
            mallory.sendall(part)
        except OSError:
            break
    until(lambda: place.guard.ended == 1)
    until(lambda: not open_(mallory))
    ((whence, why),) = place.guard.ends()
    assert whence == "127.0.0.1"
    assert why.endswith("bytes wait that nobody needs")
    honest.send(b"second")
    assert place.read() is one
    assert not one.cut


def test_messages_that_nobody_reads_yet_are_bounded(stack):
    place = Place(stack)
    dealer = place.dealer()
    dealer.send(b"first")
    one = place.read()
    for _ in range(NEEDS // 1000 - 1):
        dealer.send(bytes(1000))
    time.sleep(3 * guard.LOOK_S)
    assert 0 < one.unread <= NEEDS  # as much as it may need
    assert not one.cut
    for _ in range(guard.BESIDES // 1000 + 100):
        dealer.send(bytes(1000))
    until(lambda: one.cut)


def test_of_silent_connections_the_oldest_go_and_who_speaks_stays(stack):
    place = Place(stack)
    place.guard._budget = 3
    speaker = place.dealer()
    speaker.send(b"first")
    one = place.read()
    silent = []
    for _ in range(5):
        silent.append(place.raw())
        until(lambda: len(place.guard._silent) + place.guard.ended == len(silent))
    until(lambda: not open_(silent[0]) and not open_(silent[1]))
    assert all(map(open_, silent[2:]))
    assert place.guard.ended == 2
    newcomer = place.dealer()
    newcomer.send(b"first")
    assert place.read() is not one
    assert not one.cut


def test_one_key_has_so_many_connections(stack, folder, monkeypatch):
    monkeypatch.setattr(guard, "MOST_OF_A_KEY", 2)
    place = Place(stack, folder)
    ones = []
    for _ in range(3):
        place.dealer().send(b"here")
        ones.append(place.read())
    assert [one.cut for one in ones] == [True, False, False]


def test_who_spoke_lately_stays(stack):
    """Also without keys there are not more than can be borne."""
    place = Place(stack)
    place.guard._budget = 2
    first, ones = place.dealer(), []
    first.send(b"here")
    ones.append(place.read())
    for k in range(2):
        place.dealer().send(b"here")
        ones.append(place.read())
        until(lambda k=k: ones[k]._spoke)
        first.send(b"again")
        assert place.read() is ones[0]
        until(lambda: ones[0]._spoke == ones[0].read)
    assert [one.cut for one in ones] == [False, True, False]


@pytest.mark.parametrize(("blame", "most"), [(1, MOST_WRONG), (GRAVE, MOST_OFFENCES + 1)])
def test_who_says_nothing_of_use_is_cut(stack, blame, most):
    place = Place(stack)
    dealer = place.dealer()
    for k in range(most):
        dealer.send(b"x")
        one = place.read(judge=blame)
        assert one.cut == (k == most - 1)


def test_what_is_of_use_excuses_what_was_not(stack):
    place = Place(stack)
    dealer = place.dealer()
    for k in range(2 * MOST_WRONG):
        dealer.send(b"x")
        one = place.read(judge=k % 100 > 0)
    assert not one.cut


def test_a_descriptor_that_is_another_s_is_left_alone(stack):
    """The number of a connection that is closed may be a file's, or another socket's."""
    with socket.create_server(("127.0.0.1", 0)) as other, socket.socket() as mine:
        mine.connect(other.getsockname())
        with pytest.raises(OSError, match=r"another's"):
            guard.Connection(mine.fileno(), other.getsockname()[1], ours=False)
        guard.Connection(mine.fileno(), other.getsockname()[1], ours=True).socket.close()
    left, right = socket.socketpair()
    with left, right, pytest.raises(OSError, match=r"another's"):
        guard.Connection(left.fileno(), "/run/offbeat", ours=False)
    with open(__file__) as file, pytest.raises(OSError, match="Socket operation on non-socket"):
        guard.Connection(file.fileno(), 1, ours=False)


def test_a_duplicate_is_no_connection(stack):
    """A number that is told late may be one of the guard's own by then."""
    place = Place(stack)
    place.dealer().send(b"first")
    one = place.read()
    with place.guard._lock:
        assert place.guard._opened(place.router, one.number) is one
        assert place.guard._opened(place.router, one.socket.fileno()) is None
    assert os.fstat(one.number).st_ino == os.fstat(one.socket.fileno()).st_ino


def leave(place, *messages):
    """Say ``messages`` over a connection that is closed then."""
    with place.context.socket(zmq.DEALER) as made:
        made.linger = -1
        made.connect(place.endpoint)
        until(lambda: place.guard._table)  # who is gone before anybody looks is not counted
        for message in messages:
            made.send(message)
    until(lambda: place.guard._left and not place.guard._table)


def test_what_closed_connections_left_counts_until_it_is_read(stack):
    place = Place(stack)
    for k in range(4):
        leave(place, *[bytes(NEEDS // 4)] * 3)
        until(lambda k=k: place.guard._waiting > (k + 1) * NEEDS * 3 // 4)
    for _ in range(3 * 4):
        assert place.read() is None  # whose it was, nobody knows any more
    for _ in range(2):
        place.guard.drained()
    until(lambda: not place.guard._left and place.guard._waiting == 0)
    assert place.guard._by_address == {}


def test_a_number_that_is_another_connection_s_by_now_is_not_counted_to_it(stack):
    place = Place(stack)
    place.router.poll(0)
    leave(place, b"the first")
    second = place.dealer()
    second.send(b"the second")
    until(lambda: place.guard._table)
    place.read(), place.read()
    for _ in range(2 * (NEEDS + guard.BESIDES) // 10_000):
        second.send(bytes(10_000))
        one = place.read(judge=None)
    assert one is None
    place.guard.drained(), place.guard.drained()
    for _ in range(2 * (NEEDS + guard.BESIDES) // 10_000):
        second.send(bytes(10_000))
        one = place.read()
    time.sleep(2 * guard.LOOK_S)
    assert place.guard._waiting <= 10_000
    assert place.guard.ended == 0
    assert one.heard


def test_zeromq_s_own_beats_are_no_messages_however_slow_the_run_s_are(stack):
    place = Place(stack, heartbeat_s=900.0)
    dealer = place.stack.enter_context(place.context.socket(zmq.DEALER))
    dealer.linger, dealer.heartbeat_ivl = 0, 10
    dealer.connect(place.endpoint)
    dealer.send(b"first")
    one = place.read()
    began = one.received
    until(lambda: one.received > began + 1000)
    assert one.unread < 300


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_process_that_nobody_guards_any_more_ends(stack, monkeypatch):
    place = Place(stack)
    assert list(place.guard.ends()) == []
    monkeypatch.setattr(place.guard, "_look", lambda: 1 / 0)
    place.guard._thread.join(LIMIT_S)
    with pytest.raises(Refused, match="it goes on where it was"):
        list(place.guard.ends())


def test_a_connection_of_our_own_ends_when_it_is_given_up(stack):
    """The guard's duplicate does not keep it open."""
    place = Place(stack)
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(LIMIT_S)
        dealer = stack.enter_context(place.context.socket(zmq.DEALER))
        dealer.linger = 0
        watching = Guard(place.context, NEEDS, 2, 0.25, keyed=False)
        stack.callback(watching.close)
        watching.watch(dealer, 0)
        endpoint = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        dealer.connect(endpoint)
        watching.start()
        theirs = stack.enter_context(other.accept()[0])
        until(lambda: watching._table)
        dealer.disconnect(endpoint)
        until(lambda: (dealer.getsockopt(zmq.EVENTS), not open_(theirs))[1])


def test_who_is_busy_for_hours_is_sent_no_more_than_is_needed():
    link, now_s, sent = ReliableChannel(resend_s=sockets.PIECE_S), 0.0, 0
    for _ in range(400):
        link.send(b"piece")
    while now_s < 3 * 3600:
        sent += len(link.out(now_s)) * (wire.PIECE_BYTES + 200)
        now_s = link.due_s()
    large = {"result": wire.Kind(guard.Connection, {"x": wire.ArraySpec("<f8", (5 * 10**7,))})}
    assert 64 * 2**20 < sent <= guard.needs(large)


def test_what_a_node_may_need_follows_the_run():
    small = {"result": wire.Kind(guard.Connection, {"payload": wire.ArraySpec("<f8", (10,))})}
    large = {"result": wire.Kind(guard.Connection, {"payload": wire.ArraySpec("<f8", (10**7,))})}
    assert guard.needs(say.spoken(np.zeros(10))) == 80 * (4 * 100 + wire.INLINE_BYTES)
    assert guard.needs({}) == 80 * wire.INLINE_BYTES
    assert guard.needs(small) == 80 * (100 + wire.INLINE_BYTES)
    assert guard.needs(large) == 80 * (wire.PIECE_BYTES + wire.INLINE_BYTES)


def test_as_many_files_may_be_open_as_the_system_allows():
    script = (
        "import resource as r; from offbeat.runtime.transport.guard import raise_limit\n"
        "r.setrlimit(r.RLIMIT_NOFILE, (64, 256))\n"
        "print(raise_limit(), r.getrlimit(r.RLIMIT_NOFILE))"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert said.stdout == "256 (256, 256)\n"
