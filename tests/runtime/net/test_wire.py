"""What is read is what was written; anything else is a ``PeerError`` with a name."""

import random
import resource
import struct

import numpy as np
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.msgpack import encode as encoded

from offbeat.algorithms.compression import COMPRESSORS
from offbeat.runtime.base.errors import (
    BadArray,
    BadHeader,
    PeerError,
    TooLarge,
    UnknownKind,
    WrongRun,
    WrongVersion,
)
from offbeat.runtime.experiment.engines import Liveness
from offbeat.runtime.protocol import messages as say
from offbeat.runtime.protocol import wire
from offbeat.runtime.protocol.server import ServerProtocol
from offbeat.runtime.protocol.worker import WorkerProtocol
from offbeat.runtime.transport import sockets

D = 7
X = np.arange(D, dtype=np.float32)
KINDS = say.kinds(X, {"first": np.zeros((1, D), np.float32), "steps": np.zeros(1, np.int64)})
KEPT = {"kept.first": np.ones((1, D), np.float32), "kept.steps": np.array([3])}
WORK = say.JobMessage(1, 2, 3, 4, 5)


def posts(kind="work", body=WORK, arrays=None, few=wire.INLINE_BYTES, **more):
    arrays = {"x": X, **KEPT} if arrays is None else arrays
    options = {"run": "r", "node": "n", "incarnation": 1, "sequence": 9, **more}
    before, wire.INLINE_BYTES = wire.INLINE_BYTES, few
    try:
        return [wire.pack(p, **options) for p in wire.parcels(kind, body, arrays)]
    finally:
        wire.INLINE_BYTES = before


def reader():
    return wire.Reader("r", KINDS)


@pytest.mark.parametrize(("few", "count"), [(0, 4), (4 * D, 1), (8, 3)])
def test_what_is_read_is_what_was_written(few, count):
    (frames,) = posts(few=few)
    assert len(frames) == count
    message = reader().read([bytearray(frame) for frame in frames])
    assert message.body == WORK
    assert (message.head.run, message.head.node, message.head.sequence) == ("r", "n", 9)
    for name, array in {"x": X, **KEPT}.items():
        np.testing.assert_array_equal(message.arrays[name], array)
        assert message.arrays[name].dtype == array.dtype
        message.arrays[name][:] = 0  # it may be written to
        assert array.any()


def test_a_header_of_as_many_arrays_as_may_be_is_read():
    many = {str(k): np.full(wire.INLINE_BYTES, k, np.uint8) for k in range(wire.MOST_ARRAYS)}
    spec = wire.ArraySpec("|u1", (wire.INLINE_BYTES,))
    source = wire.Reader("r", {"work": wire.Kind(say.JobMessage, dict.fromkeys(many, spec))})
    (frames,) = posts(arrays=many)
    assert len(frames) == 1
    assert [array[-1] for array in source.read(frames).arrays.values()] == list(range(len(many)))


def test_large_arrays_are_not_copied():
    (frames,) = posts(few=0)
    assert np.shares_memory(np.frombuffer(frames[1], np.float32), X)
    raw = np.frombuffer(bytearray(frames[1]), np.uint8)
    message = reader().read([frames[0], raw.data, *frames[2:]])
    assert np.shares_memory(message.arrays["x"], raw)


def test_no_pickle_is_near_the_wire():
    import offbeat.runtime.protocol as package

    for file in __import__("pathlib").Path(package.__file__).parent.glob("*.py"):
        assert "import pickle" not in file.read_text()


@settings(deadline=None)
@given(st.integers(1, 5000), st.sampled_from([16, 100, 1024]))
def test_large_arrays_travel_in_pieces(size, piece):
    x = np.random.default_rng(size).random(size)
    kinds = say.kinds(x, {"m": np.zeros((1, size))})
    before, wire.PIECE_BYTES = wire.PIECE_BYTES, piece
    try:
        sent = posts("result", say.ResultMessage(1, 0.5, 0.1), {"payload": x, "kept.m": x[None]})
        assert all(len(frame) <= piece for frames in sent for frame in frames[1:])
        assert len(sent) == 1 + (2 * -(-8 * size // piece) if 8 * size > piece else 0)
        assembly, got = wire.Assembly(kinds), []
        source = wire.Reader("r", kinds)
        for frames in sent:
            got.append(assembly.take(source.read(frames)))
        assert got[:-1] == [None] * (len(got) - 1)
        np.testing.assert_array_equal(got[-1].arrays["payload"], x)
        np.testing.assert_array_equal(got[-1].arrays["kept.m"], x[None])
    finally:
        wire.PIECE_BYTES = before


def test_pieces_out_of_place(monkeypatch):
    monkeypatch.setattr(wire, "PIECE_BYTES", 8)
    source, sent = reader(), posts(arrays={"x": X})
    first, *pieces = sent
    with pytest.raises(BadArray, match="a piece of nothing"):
        wire.Assembly(KINDS).take(source.read(pieces[0]))
    assembly = wire.Assembly(KINDS)
    assembly.take(source.read(first))
    with pytest.raises(BadArray, match="a piece at 8 to 16, where 0 comes next"):
        assembly.take(source.read(pieces[1]))
    with pytest.raises(BadArray, match="between the pieces of another"):
        assembly.take(source.read(first))


@pytest.mark.parametrize("text", ["topk(3)", "qsgd(4)", "sign"])
def test_a_compressors_frame_is_an_array(text):
    message = COMPRESSORS.parse(text).compress(X, np.random.default_rng(0))
    (frame,) = message.encode()
    (frames,) = posts("result", say.ResultMessage(1, 0.5, 0.1), {"payload": frame, **KEPT})
    got = reader().read(frames).arrays["payload"]
    np.testing.assert_array_equal(got, message.dense())


def header(**changes):
    fields = {
        "version": 1, "run": "r", "node": "n", "incarnation": 1, "to": 0, "sequence": 1,
        "acknowledged": 0, "kind": "work",
        "arrays": [["x", "<f4", [D], "raw", 4 * D]],
        "body": encoded(WORK),
    }  # fmt: skip
    assert not changes.keys() - fields.keys()
    return encoded(list((fields | changes).values()))


def one(**changes):
    return {"arrays": [list(({"name": "x", "dtype": "<f4", "shape": [D], "codec": "raw",
                              "nbytes": 4 * D} | changes).values())]}  # fmt: skip


GOOD = [header(), X.tobytes()]
BAD = {
    "no frames": ([], BadHeader),
    "empty": ([b""], BadHeader),
    "truncated": ([GOOD[0][:-3], GOOD[1]], BadHeader),
    "trailing bytes": ([GOOD[0] + b"\0", GOOD[1]], BadHeader),
    "reserved byte": ([b"\xc1"], BadHeader),
    "invalid UTF-8": ([header(run="ab").replace(b"\xa2ab", b"\xa2\xff\xfe")], BadHeader),
    "deep nesting": ([b"\x91" * 100_000], BadHeader),
    "deep body": ([header(body=b"\x91" * 100_000), GOOD[1]], BadHeader),
    "array of 2^32-1": ([b"\xdd\xff\xff\xff\xff"], BadHeader),
    "text of 2^32-1": ([b"\x9a\x01\xdb\xff\xff\xff\xff"], BadHeader),
    "bytes of 2^32-1": ([b"\x9a\x01\xc6\xff\xff\xff\xff"], BadHeader),
    "a map": ([b"\x81\xa1a\x01"], BadHeader),
    "extension": ([b"\xc7\x02\x01ab"], BadHeader),
    "huge header": ([b"\x9a" + bytes(wire.MOST_HEADER)], TooLarge),
    "another version": ([header(version=2), GOOD[1]], WrongVersion),
    "another version's shape": ([b"\x92\x07\xa1x"], WrongVersion),
    "another run": ([header(run="s"), GOOD[1]], WrongRun),
    "unknown kind": ([header(kind="__class__"), GOOD[1]], UnknownKind),
    "unknown field": ([GOOD[0].replace(b"\x9a", b"\x9b", 1) + b"\x01", GOOD[1]], BadHeader),
    "negative counter": ([header(sequence=-1), GOOD[1]], BadHeader),
    "counter of 2^60": ([header(sequence=2**60), GOOD[1]], BadHeader),
    "body of another kind": ([header(body=b"\x91\x01"), GOOD[1]], BadHeader),
    "text for a number": ([header(incarnation="1"), GOOD[1]], BadHeader),
    "an attribute": ([header(**one(name="__class__")), GOOD[1]], BadArray),
    "twice the same": ([header(arrays=one()["arrays"] * 2), GOOD[1], GOOD[1]], BadArray),
    "too many arrays": ([header(arrays=one()["arrays"] * 33), *[GOOD[1]] * 33], BadHeader),
    "wrong dtype": ([header(**one(dtype="<f8")), GOOD[1]], BadArray),
    "object dtype": ([header(**one(dtype="|O")), GOOD[1]], BadHeader),
    "void dtype": ([header(**one(dtype="|V4")), GOOD[1]], BadHeader),
    "wrong shape": ([header(**one(shape=[D - 1], nbytes=4 * D - 4)), GOOD[1]], BadArray),
    "shape of -1": ([header(**one(shape=[-1])), GOOD[1]], BadHeader),
    "five axes": ([header(**one(shape=[1, 1, 1, 1, D])), GOOD[1]], BadHeader),
    "said too few bytes": ([header(**one(nbytes=4 * D - 1)), GOOD[1]], BadArray),
    "said and sent too few bytes": ([header(**one(nbytes=4 * D - 4)), GOOD[1][:-4]], BadArray),
    "sent too few bytes": ([GOOD[0], GOOD[1][:-1]], BadArray),
    "too few bytes in the header": ([header(**one(data=GOOD[1][:-1]))], BadArray),
    "in the header and in a frame": ([header(**one(data=GOOD[1])), GOOD[1]], BadArray),
    "text for bytes": ([header(**one(data="text"))], BadHeader),
    "a second datum": ([header(**one(data=GOOD[1], more=GOOD[1]))], BadHeader),
    "no frame": ([GOOD[0]], BadArray),
    "an array missing": (
        [header(kind="result", body=encoded(say.ResultMessage(1, 0.5, 0.1)), arrays=[])],
        BadArray,
    ),
    "one frame more": ([*GOOD, b""], BadArray),
    "coded, and too large": ([header(**one(codec="coded", nbytes=10**9)), b""], TooLarge),
    "coded, and nonsense": ([header(**one(codec="coded", nbytes=5)), b"12345"], PeerError),
    "piece of nothing": (
        [header(kind="piece", arrays=[], body=b"\x91\x00"), b""], TooLarge,
    ),
    "piece in two frames": (
        [header(kind="piece", arrays=[], body=b"\x91\x00"), b"a", b"b"], BadArray,
    ),
}  # fmt: skip


def test_the_good_one_is_good():
    np.testing.assert_array_equal(reader().read(GOOD).arrays["x"], X)


@pytest.mark.parametrize("case", BAD)
def test_each_wrong_message_has_a_name(case):
    frames, error = BAD[case]
    with pytest.raises(error) as told:
        reader().read(frames)
    assert isinstance(told.value, PeerError)
    assert told.value.name in {e.name for e in (*PeerError.__subclasses__(), PeerError)}


def test_many_frames_are_refused_before_anything_is_made_of_them():
    with pytest.raises(BadArray, match="has 1001 frames for 1 arrays"):
        reader().read([GOOD[0], *[GOOD[1]] * 1001])


def mutated(g, frames):
    """``frames`` with something wrong."""
    frames = [bytearray(frame) for frame in frames]
    for _ in range(g.randint(1, 3)):
        how = g.randrange(8)
        frame = g.choice(frames) if frames else bytearray()
        at = g.randrange(len(frame)) if frame else 0
        if how == 0 and frame:
            frame[at] ^= 1 << g.randrange(8)
        elif how == 1 and frame:
            frame[at] = g.choice([0, 1, 0x7F, 0x80, 0x90, 0xC1, 0xC6, 0xDB, 0xDD, 0xDF, 0xFF])
        elif how == 2:
            del frame[at:]
        elif how == 3:
            frame += g.randbytes(g.randint(1, 20))
        elif how == 4 and frame:
            frame[at:at] = struct.pack(">BI", g.choice([0xC6, 0xDB, 0xDD, 0xDF]), 2**32 - 1)
        elif how == 5:
            frames.append(bytearray(g.randbytes(g.randint(0, 40))))
        elif how == 6 and frames:
            frames.pop(g.randrange(len(frames)))
        elif frame:
            frame[at : at + 4] = g.randbytes(4)
    return [bytes(frame) for frame in frames]


def samples():
    bodies = {
        "hello": say.Hello(1, "1", "here"), "welcome": say.Welcome(1, 1, 0, 1.0, "e", "m"),
        "refusal": say.Refusal(1, "no", 1.0), "again": say.Again(), "ready": say.Ready("m"),
        "pulse": say.Pulse(), "cancel": say.Cancel(1), "failure": say.Failure(1, "why"),
        "leave": say.Leave("why"), "over": say.Over("why", True), "ask": say.Ask(),
        "status": say.Status("{}"),
    }  # fmt: skip
    plain = [posts(kind, body, {}, to=1)[0] for kind, body in bodies.items()]
    result = "result", say.ResultMessage(1, 0.5, 0.1), {"payload": X, **KEPT}
    heavy = [posts(few=few, to=1)[0] for few in (0, wire.INLINE_BYTES)]
    heavy += [posts(*result, few=few)[0] for few in (0, wire.INLINE_BYTES)]
    return plain + heavy + [posts("piece", wire.Piece(0), {})[0]]


def fuzz(seed, count):
    """Mutated messages for a reader, a server and a worker; only PeerErrors come out."""
    g, source, wrong = random.Random(seed), reader(), 0
    good = [[bytes(frame) for frame in frames] for frames in samples()]
    hub = ServerProtocol("r", "e", KINDS, 2, 1, Liveness(1.0), "1")
    spoke = WorkerProtocol("n", 1, "1", "here", 0.0)
    model = X.tobytes()
    for k in range(count):
        frames = mutated(g, g.choice(good))
        try:
            source.read(frames)
        except PeerError:
            wrong += 1
        hub.receive(b"a", g.choice([None, "n"]), frames, k * 1e-3)
        hub.tick(k * 1e-3)
        spoke.receive(frames, k * 1e-3)
        for box in (hub.outbox, hub.cuts, hub.notes, hub.events, spoke.outbox, spoke.orders):
            box.clear()
        if spoke.fate is not None:
            spoke = WorkerProtocol("n", 1, "1", "here", 0.0)
        if hub.roster.quarantined:
            hub.roster.quarantined.clear()
    assert X.tobytes() == model
    return wrong, hub


def test_mutated_frames():
    wrong, hub = fuzz(1, 20_000)
    assert wrong > 10_000
    assert len([name for name, count in hub.counts.items() if count > 20]) > 4


@pytest.mark.soak
@pytest.mark.parametrize("block", range(10))
def test_a_million_mutated_frames(block):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wrong, _ = fuzz(100 + block, 100_000)
    assert wrong > 50_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


@settings(deadline=None, max_examples=300)
@given(st.lists(st.binary(max_size=60), max_size=4))
def test_no_bytes_raise_anything_else(frames):
    assert not frames or frames[0] != header()
    with pytest.raises(PeerError, match=r"."):
        reader().read(frames)


@settings(deadline=None)
@given(st.data())
def test_a_message_cut_anywhere(data):
    (frames,) = posts(few=data.draw(st.sampled_from([0, wire.INLINE_BYTES])))
    whole = [bytes(frame) for frame in frames]
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place] = whole[place][: data.draw(st.integers(0, len(whole[place]) - 1))]
    with pytest.raises(PeerError):
        reader().read(whole)


def test_coded_arrays_of_all_lengths_share_a_buffer(monkeypatch):
    monkeypatch.setattr(wire, "PIECE_BYTES", 16)
    kinds = {"result": wire.Kind(wire.Piece, {"payload": wire.ArraySpec("<f8", (200,))})}
    made, pool = [], wire.Pool()
    pool.make = lambda nbytes: made.append(nbytes) or np.empty(nbytes, np.uint8)
    assembly = wire.Assembly(kinds, pool)
    reader = wire.Reader("r", kinds)
    for k in (5, 9, 40, 3):
        row = np.zeros(200)
        row[:k] = 1.0
        coded = COMPRESSORS.parse(f"topk({k})").compress(row, None).encode()[0]
        found = None
        for parcel in wire.parcels("result", wire.Piece(0), {"payload": bytes(coded)}):
            frames = wire.pack(parcel, run="r", node="a", incarnation=1)
            found = assembly.take(reader.read([bytes(frame) for frame in frames]))
        np.testing.assert_array_equal(found.arrays["payload"], row)
    assert made == [2000 + 2**16]


def test_of_a_message_of_many_frames_few_are_kept():
    context = zmq.Context()
    one, other = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    one.bind("inproc://frames")
    other.connect("inproc://frames")
    other.send_multipart([b"x"] * 900)
    other.send_multipart([b"next"])
    assert len(sockets.receive(one)) == sockets.MOST_FRAMES
    assert [frame.bytes for frame in sockets.receive(one)] == [b"next"]
    context.destroy(0)


def test_pieces_are_of_what_is_large():
    """In a run of small models nobody can have them held for what never comes."""
    small = {"result": wire.Kind(wire.Piece, {"x": wire.ArraySpec("<f8", (10,))})}
    large = {"result": wire.Kind(wire.Piece, {"x": wire.ArraySpec("<f8", (10**6,))})}
    frames = wire.pack(
        wire.Frames("piece", wire._encode(wire.Piece(0)), (), (b"part",)), run="r", node="a",
        incarnation=1,
    )  # fmt: skip
    assert wire.Reader("r", large).read(frames).piece == b"part"
    with pytest.raises(BadArray, match="nothing is so large here that it comes in pieces"):
        wire.Reader("r", small).read(frames)
