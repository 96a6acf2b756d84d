"""What a message looks like on the wire, and what of it is believed.

A message is a header and one raw frame an array.  The header is msgpack, an array of fixed fields:
version, run, sender and its incarnation, addressee's incarnation, sequence, acknowledgement, kind,
arrays (name, dtype, shape, codec, bytes), and the kind's own body.  Everything is checked against
what this run can need before a byte of payload is looked at, and nothing is ever unpickled.

Arrays of up to ``INLINE_BYTES`` travel in the header: a frame of their own costs more than a copy.
Arrays larger than ``PIECE_BYTES`` follow their message in pieces, messages of kind "piece", which
the receiver copies into one buffer: twice as fast as one long frame, and nothing waits behind it.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from offbeat.algorithms.compression.contract import decode
from offbeat.runtime.base.errors import (
    BadArray,
    BadHeader,
    TooLarge,
    UnknownKind,
    WrongRun,
    WrongVersion,
)

VERSION = 1
MOST_HEADER = 2**18  # bytes; a welcome carries the text of an experiment
MOST_ARRAYS = 32
MOST_NAME = 64
MOST_RANK = 4
INLINE_BYTES = 2**12  # of an array in the header; 32 of them and a body are within its limit
PIECE_BYTES = 2**20
MOST_POOLED = 64  # buffers
CODED_SLACK = 1.25, 2**16  # a coded array may take so much more than a raw one: factor, bytes
DTYPES = ("<f4", "<f8", "<f2", "bf16", "<i4", "<i8", "|u1")
_NUMPY = {name: np.dtype("<u2" if name == "bf16" else name) for name in DTYPES}

Buffer = Any  # of bytes: bytes, bytearray, memoryview, or a frame of ZeroMQ
Name = Annotated[str, Meta(min_length=1, max_length=MOST_NAME)]
Counter = Annotated[int, Meta(ge=0, lt=2**53)]


class Array(Struct, array_like=True, forbid_unknown_fields=True, gc=False):
    """What a header says of one array."""

    name: Name
    dtype: Literal["<f4", "<f8", "<f2", "bf16", "<i4", "<i8", "|u1"]
    shape: Annotated[tuple[Counter, ...], Meta(max_length=MOST_RANK)]
    codec: Literal["raw", "coded"]
    nbytes: Counter
    """As it travels; more than ``PIECE_BYTES``: in pieces."""
    data: bytearray | None = None
    """The bytes, where they are few; else they are in the next frame, or in pieces."""


class Header(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """What every message begins with."""

    version: int
    run: Annotated[str, Meta(max_length=MOST_NAME)]
    node: Name
    """Who sends it."""
    incarnation: Counter
    """Of the sender; 0 where it has none yet."""
    to: Counter
    """The incarnation of the addressee that is meant; 0: any."""
    sequence: Counter
    """Of the link's messages; 0: outside of their order."""
    acknowledged: Counter
    """All the sender has of the other direction, without a gap."""
    kind: Name
    arrays: Annotated[tuple[Array, ...], Meta(max_length=MOST_ARRAYS)]
    body: bytes


class Piece(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """The next bytes of the array that is under way."""

    offset: Counter


@dataclass(frozen=True)
class ArraySpec:
    """What an array of a kind has to be."""

    dtype: str
    shape: tuple[int, ...]
    optional: bool = False
    loose: bool = False
    """At most so many entries, also <i8 or <f8, coded ones still coded: its reader checks more."""

    @cached_property
    def nbytes(self) -> int:
        """Of the raw array."""
        return math.prod(self.shape) * _NUMPY[self.dtype].itemsize


class Kind(NamedTuple):
    """What messages of one kind may carry."""

    body: type[Struct]
    arrays: Mapping[str, ArraySpec] = {}
    stranger: bool = False
    """Whether it may come from who does not know the run yet."""


class Frames(Struct, frozen=True, gc=False):
    """A message ready to go, but for its place in the order."""

    kind: str
    body: bytes
    arrays: tuple[Array, ...] = ()
    frames: tuple[Any, ...] = ()


class Received(Struct, frozen=True, gc=False):
    """A message that was read."""

    head: Header
    body: Any
    arrays: dict[str, NDArray | None]
    missing: list[Array]
    """Those that follow in pieces; in ``arrays`` they are None."""
    piece: memoryview | None = None


_encode = msgspec.msgpack.Encoder().encode
_header = msgspec.msgpack.Decoder(Header)
PIECE = Kind(Piece)


def parcels(kind: str, body: Struct, arrays: Mapping[str, Any] | None = None) -> list[Frames]:
    """The messages that carry ``body`` and ``arrays``: one, and the pieces of what is large.

    Args:
        kind: of message.
        body: the kind's own fields.
        arrays: name -> contiguous array, or the bytes of a compressor's frame.
    """
    said, frames, pieces, few = [], [], [], min(INLINE_BYTES, PIECE_BYTES)
    for name, value in (arrays or {}).items():
        if isinstance(value, np.ndarray):
            flat = np.ascontiguousarray(value).data.cast("B")
            one = Array(name, value.dtype.str, value.shape, "raw", flat.nbytes)
        else:
            flat = memoryview(value)
            one = Array(name, "|u1", (flat.nbytes,), "coded", flat.nbytes)
        said.append(one)
        if flat.nbytes <= few:
            one.data = bytearray(flat)
            continue
        if flat.nbytes <= PIECE_BYTES:
            frames.append(flat)
            continue
        for at in range(0, flat.nbytes, PIECE_BYTES):
            part = flat[at : at + PIECE_BYTES]
            pieces.append(Frames("piece", _encode(Piece(at)), (), (part,)))
    return [Frames(kind, _encode(body), tuple(said), tuple(frames)), *pieces]


def pack(
    parcel: Frames,
    *,
    run: str,
    node: str,
    incarnation: int,
    to: int = 0,
    sequence: int = 0,
    acknowledged: int = 0,
) -> list[Any]:
    """The frames of a message."""
    head = Header(
        VERSION,
        run,
        node,
        incarnation,
        to,
        sequence,
        acknowledged,
        parcel.kind,
        parcel.arrays,
        parcel.body,
    )
    return [_encode(head), *parcel.frames]


class Reader:
    """Reads what comes in, and believes what this run can need.

    Args:
        run: whose messages; "": none is known yet.
        kinds: what is spoken.

    >>> from offbeat.runtime.protocol.wire import *
    >>> reader = Reader("", {"piece": PIECE})
    >>> reader.read([b"garbage"])
    Traceback (most recent call last):
    ...
    offbeat.runtime.base.errors.BadHeader: the header cannot be read: Expected `array`, got `int`
    """

    def __init__(self, run: str, kinds: Mapping[str, Kind]) -> None:
        self.run, self.kinds = run, {**kinds, "piece": PIECE}
        self._bodies = {
            name: msgspec.msgpack.Decoder(kind.body) for name, kind in self.kinds.items()
        }
        members = [kind for kind in kinds.values() if not kind.stranger]
        arrays = [one for kind in members for one in kind.arrays.values()]
        self._in_pieces = any(_most_coded(one) > PIECE_BYTES for one in arrays)

    def read(self, frames: Sequence[Buffer]) -> Received:
        """The message in ``frames``.

        Raises:
            PeerError: of the kind that says what is wrong with it.
        """
        if not frames:
            raise BadHeader("a message without frames")
        head, rest = _head(frames[0]), frames[1:]
        kind = self.kinds.get(head.kind)
        if kind is None:
            raise UnknownKind(f'messages of kind "{head.kind}" are not spoken here')
        if head.run != self.run and not kind.stranger:
            raise WrongRun(f'a message of run "{head.run}", not "{self.run}"')
        try:
            body = self._bodies[head.kind].decode(head.body)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise BadHeader(f"the body of {head.kind} cannot be read: {error}") from None
        if kind is PIECE:
            if head.arrays or len(rest) != 1:
                raise BadArray(f"a piece has one frame, not {len(rest)}")
            part = memoryview(rest[0])
            if not 0 < part.nbytes <= PIECE_BYTES:
                raise TooLarge(f"a piece of {part.nbytes} bytes; at most {PIECE_BYTES}")
            if not self._in_pieces:
                raise BadArray("nothing is so large here that it comes in pieces")
            return Received(head, body, {}, [], part)
        arrays, missing = _arrays(head, kind.arrays, rest)
        return Received(head, body, arrays, missing)


def _head(frame: Buffer) -> Header:
    size = len(frame)
    if size > MOST_HEADER:
        raise TooLarge(f"a header of {size} bytes; at most {MOST_HEADER}")
    try:
        head = _header.decode(frame)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        # A header is a short array that begins with a small number: the version.
        start = bytes(memoryview(frame)[:2])
        if size > 1 and start[0] >> 4 == 9 and VERSION != start[1] < 128:
            raise WrongVersion(_versions(start[1])) from None
        raise BadHeader(f"the header cannot be read: {error}") from None
    if head.version != VERSION:
        raise WrongVersion(_versions(head.version))
    return head


def _versions(theirs: int) -> str:
    return f"it speaks version {theirs} of the protocol, this side version {VERSION}"


def _arrays(
    head: Header, specs: Mapping[str, ArraySpec], frames: Sequence[Buffer]
) -> tuple[dict[str, NDArray | None], list[Array]]:
    """Name -> array, a view of its bytes; and those that follow in pieces."""
    found: dict[str, NDArray | None] = {}
    missing: list[Array] = []
    used = 0
    for one in head.arrays:
        spec = specs.get(one.name)
        if spec is None or one.name in found:
            raise BadArray(f'{head.kind} has no array "{one.name}", or has it twice')
        check(one, spec, head.kind)
        if one.nbytes > PIECE_BYTES:
            found[one.name] = None
            missing.append(one)
            continue
        flat: Buffer = one.data
        if flat is None:
            if used == len(frames):
                raise BadArray(f"{head.kind} lacks the frame of {one.name}")
            flat = frames[used]
            used += 1
        if len(flat) != one.nbytes:
            raise BadArray(f"{one.name} has {len(flat)} bytes; its header says {one.nbytes}")
        found[one.name] = opened(one, spec, flat)
    if used != len(frames):
        raise BadArray(f"{head.kind} has {len(frames)} frames for {used} arrays")
    for name, spec in specs.items():
        if name not in found and not spec.optional:
            raise BadArray(f"{head.kind} lacks {name}")
    return found, missing


def check(one: Array, spec: ArraySpec, kind: str) -> None:
    """Raise BadArray or TooLarge where ``one`` is not what ``spec`` says."""
    if one.codec == "coded":
        if not 0 < one.nbytes <= _most_coded(spec):
            raise TooLarge(f"{kind}.{one.name} has {one.nbytes} coded bytes for {spec}")
        return
    if spec.loose and one.dtype in (spec.dtype, "<i8", "<f8") and len(one.shape) == 1:
        spec = ArraySpec(one.dtype, (min(one.shape[0], spec.shape[0]),))
    if one.dtype != spec.dtype or one.shape != spec.shape:
        raise BadArray(
            f"{kind}.{one.name} is {one.dtype}{list(one.shape)}, not {spec.dtype}{list(spec.shape)}"
        )
    if one.nbytes != spec.nbytes:
        raise BadArray(f"{kind}.{one.name} has {one.nbytes} bytes, not {spec.nbytes}")


def _most_coded(spec: ArraySpec) -> int:
    factor, slack = CODED_SLACK
    return int(factor * spec.nbytes + slack)


def opened(one: Array, spec: ArraySpec, flat: Buffer) -> NDArray:
    """The array in ``flat``, whose header was checked; a view where it is aligned and raw."""
    if one.codec == "raw":
        array: NDArray = np.ndarray(one.shape, _NUMPY[one.dtype], flat)
        return array if array.flags.aligned else array.copy()
    if spec.loose:
        return np.frombuffer(flat, np.uint8)
    row = decode([flat], math.prod(spec.shape)).dense()
    if row.dtype.str != spec.dtype:
        raise BadArray(f"{one.name} holds {row.dtype.str}, not {spec.dtype}")
    return row.reshape(spec.shape)


def _new(nbytes: int) -> NDArray[np.uint8]:
    return np.empty(nbytes, np.uint8)


class Pool:
    """Memory for large arrays, handed out again once nothing looks at it any more.

    To touch new pages costs as much as to fill them.
    """

    def __init__(self) -> None:
        self._buffers: list[NDArray[np.uint8]] = []
        self.make: Callable[[int], NDArray[np.uint8]] = _new  # where they are from

    def take(self, nbytes: int) -> NDArray[np.uint8]:
        """A buffer ``[nbytes]``; what it holds is left over."""
        held = self._buffers
        for place in range(len(held)):
            # An array made of it, and all views of that, refer to it.
            if sys.getrefcount(held[place]) == _UNUSED and held[place].nbytes == nbytes:
                return held[place]
        made = self.make(nbytes)
        if len(self._buffers) < MOST_POOLED:
            self._buffers.append(made)
        return made


_UNUSED = 2  # references: the pool's, and the question's own


class Assembly:
    """Puts pieces together; takes a link's messages in their order.

    Args:
        kinds: what arrays have to be.
        pool: where their memory is from.
    """

    def __init__(self, kinds: Mapping[str, Kind], pool: Pool | None = None) -> None:
        self._kinds, self._pool = kinds, pool or Pool()
        self._message: Received | None = None  # whose pieces are coming
        self._buffer: NDArray[np.uint8] = np.empty(0, np.uint8)
        self._filled = 0

    def take(self, message: Received) -> Received | None:
        """``message``, or the one that its piece makes whole, or None.

        Raises:
            PeerError: a piece out of its place.
        """
        part = message.piece
        if self._message is None:
            if part is not None:
                raise BadArray("a piece of nothing")
            if not message.missing:
                return message
            self._message = message
            self._open()
            return None
        if part is None:
            raise BadArray(f"a {message.head.kind} between the pieces of another message")
        at, end = message.body.offset, message.body.offset + part.nbytes
        if at != self._filled or end > len(self._buffer):
            raise BadArray(f"a piece at {at} to {end}, where {self._filled} comes next")
        self._buffer[at:end] = np.frombuffer(part, np.uint8)
        self._filled = end
        if end < len(self._buffer):
            return None
        whole, one = self._message, self._message.missing.pop(0)
        spec = self._kinds[whole.head.kind].arrays[one.name]
        whole.arrays[one.name] = opened(one, spec, self._buffer.data)
        if whole.missing:
            self._open()
            return None
        self._message, self._buffer = None, np.empty(0, np.uint8)
        return whole

    def _open(self) -> None:
        assert self._message is not None
        one = self._message.missing[0]
        spec = self._kinds[self._message.head.kind].arrays[one.name]
        # Of one size for all that are coded: the pool is not to keep a buffer of every length.
        room = _most_coded(spec) if one.codec == "coded" else one.nbytes
        self._buffer = self._pool.take(room)[: one.nbytes]
        self._filled = 0
