"""What a compressor is, what travels, and how it is read back.

A compressor maps x in R^d to a message.  It is *contractive* with alpha in (0, 1] where

    E ||C(x) - x||^2 <= (1 - alpha) ||x||^2,

*unbiased* with omega >= 0 where E Q(x) = x and E ||Q(x) - x||^2 <= omega ||x||^2.  Some are both,
some (sign, hard threshold) neither.  The operator of the mathematics is what the receiver reads:
``decode(message.encode()).dense()`` equals ``message.dense()`` bit for bit.

Where a compressor is ``apart``, a tensor of a device is compressed there, and only what travels is
fetched; ``message.dense(device)`` is read there.  The others fetch x.

A frame is one row: 8 bytes of header (magic, version, codec, dtype, d as 32 bits), then what the
codec writes.  Messages nest: a sparse message holds a message of its values.
"""

import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from offbeat.algorithms.compression.coding import CHUNK, BitReader
from offbeat.runtime.base.errors import ConfigError, PeerError
from offbeat.runtime.base.registry import Registry, Spec
from offbeat.runtime.base.tensors import dtype_of, fetch, finite, is_tensor, joined, library, load

COMPRESSORS = Registry("compressor")

MOST_PARAMETERS = 2**30  # a frame of a few bytes may stand for so many numbers, and no more
MOST_ROWS = 2**20
MOST_NESTING = 6  # messages inside messages, of which a sum has two
MOST_MEASURED = 2**20  # numbers of one row whose error is measured; longer rows err no less
ROWS_MEASURED = 64

_HEADER = struct.Struct("<BBBBI")
HEADER = _HEADER.size
MAGIC, VERSION = 0xFB, 1
_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))

Frame = bytes | bytearray | memoryview
Random = np.random.Generator | Sequence[np.random.Generator]


class Message(ABC):
    """n compressed rows of d numbers."""

    n: int
    d: int
    dtype: np.dtype
    lead: tuple[int, ...]
    """Axes before the last of what was compressed; their product is n."""

    def __init__(self, n: int, d: int, dtype: np.dtype) -> None:
        self.n, self.d, self.dtype, self.lead = n, d, dtype, (n,)

    def dense(self, device: Any = None) -> Any:
        """``[..., d]``: what the receiver sees, an array or a tensor of ``device``."""
        with np.errstate(all="ignore"):  # a peer may combine finite numbers into infinite ones
            rows = self._rows() if device is None else self._there(device)
            return rows.reshape(*self.lead, self.d)

    @property
    def nbytes(self) -> int:
        """Bytes that travel: the sum of ``sizes``."""
        return int(self.sizes.sum())

    @property
    @abstractmethod
    def sizes(self) -> NDArray[np.int64]:
        """``[n]``: the length of each frame that ``encode()`` gives, without encoding."""

    @abstractmethod
    def encode(self) -> list[bytes]:
        """One frame a row."""

    @abstractmethod
    def _rows(self) -> NDArray:
        """``[n, d]``, dense."""

    def _there(self, device: Any) -> Any:
        """The same bits as a tensor of ``device``."""
        return load(self._rows(), device)


class Coded(Message):
    """A message whose rows all travel under one codec: the subclasses."""

    codec: ClassVar[int]

    @property
    def sizes(self) -> NDArray[np.int64]:
        sizes = HEADER + self._sizes()
        return sizes if isinstance(sizes, np.ndarray) else np.full(self.n, sizes)

    def encode(self) -> list[bytes]:
        head = _HEADER.pack(MAGIC, VERSION, self.codec, _DTYPES.index(self.dtype), self.d)
        return [b"".join((head, payload)) for payload in self._payloads()]

    @abstractmethod
    def _sizes(self) -> int | NDArray[np.int64]:
        """Bytes of each payload, ``[n]``, or of each alike."""

    @abstractmethod
    def _payloads(self) -> Sequence[Frame]:
        """What follows the header, for each row."""

    @classmethod
    @abstractmethod
    def _read(cls, source: BitReader, d: int, dtype: np.dtype, depth: int) -> Message:
        """One row from what follows the header."""


CODECS: dict[int, type[Coded]] = {}


def codec(number: int):  # type: ignore[no-untyped-def]
    """Class decorator: messages of this class travel under ``number``."""

    def decorate(cls: type[Coded]) -> type[Coded]:
        assert number not in CODECS
        cls.codec, CODECS[number] = number, cls
        return cls

    return decorate


class Stack(Message):
    """Messages of rows that differ in kind or size; they travel one by one."""

    def __init__(self, rows: Sequence[Message]) -> None:
        super().__init__(sum(row.n for row in rows), rows[0].d, rows[0].dtype)
        self.rows = rows

    def _rows(self) -> NDArray:
        return np.concatenate([row._rows() for row in self.rows])

    def _there(self, device: Any) -> Any:
        return joined([row._there(device) for row in self.rows])

    @property
    def sizes(self) -> NDArray[np.int64]:
        return np.concatenate([row.sizes for row in self.rows])

    def encode(self) -> list[bytes]:
        return [frame for row in self.rows for frame in row.encode()]


def header(source: BitReader, most: int) -> tuple[type[Coded], np.dtype, int]:
    """``(codec, dtype, d)`` of what follows, d at most ``most``."""
    magic, version, number, kind, d = _HEADER.unpack(source.take(HEADER))
    if (magic, version) != (MAGIC, VERSION):
        raise PeerError(f"a frame begins with {magic}, {version}, not {MAGIC}, {VERSION}")
    if number not in CODECS or kind >= len(_DTYPES):
        raise PeerError(f"a frame has unknown codec {number} or dtype {kind}")
    if d > most:
        raise PeerError(f"a frame says d = {d}, where at most {most} is right")
    return CODECS[number], _DTYPES[kind], d


def nested(source: BitReader, depth: int, dtype: np.dtype, most: int) -> Message:
    """A message of at most ``most`` numbers inside a message, of the same dtype."""
    if depth == MOST_NESTING:
        raise PeerError(f"a frame nests deeper than {MOST_NESTING} messages")
    cls, kind, d = header(source, most)
    if kind != dtype:
        raise PeerError(f"a frame holds {kind} inside {dtype}")
    return cls._read(source, d, dtype, depth + 1)


def decode(frames: Sequence[Frame], d: int | None = None) -> Message:
    """The message whose ``encode`` gave ``frames``: ``[d]`` for one, ``[n, d]`` for n frames.

    Memory is in proportion to the frames and to d, which a frame of a few bytes can make large:
    give the d that is expected.

    >>> import numpy as np
    >>> message = COMPRESSORS.parse("topk(1)").compress(np.array([1.0, -3.0]), None)
    >>> decode(message.encode()).dense()
    array([ 0., -3.])
    >>> decode([b"what?"])
    Traceback (most recent call last):
    ...
    offbeat.PeerError: a frame ends 3 byte(s) early

    Args:
        frames: bytes-like, one a row.
        d: of every row; None: any up to ``MOST_PARAMETERS``.

    Raises:
        PeerError: a frame is not what a compressor writes.
    """
    if not 0 < len(frames) <= MOST_ROWS:
        raise PeerError(f"{len(frames)} frames; 1 to {MOST_ROWS} are read")
    rows: list[Message] = []
    for frame in frames:
        source = BitReader(frame)
        cls, dtype, size = header(source, MOST_PARAMETERS)
        if rows and (size, dtype) != (rows[0].d, rows[0].dtype):
            raise PeerError("frames of one message differ in d or dtype")
        if size == 0 or size != (d or size):
            raise PeerError(f"a frame is for d = {size}, not {d or '1 or more'}")
        rows.append(cls._read(source, size, dtype, 0))
        source.end()
    if len(rows) > 1:
        return Stack(rows)
    rows[0].lead = ()
    return rows[0]


class Compressor(ABC):
    """Base of all compressors: state-free; what is drawn comes from the caller's generator."""

    spec: Spec | None = None
    depth = 0  # how deep its messages nest
    draws = True  # whether it needs a generator
    apart = False  # whether ``_compress`` takes tensors of a device, too
    batched = True  # whether rows draw in order when many are compressed in one call

    def alpha(self, d: int) -> float | None:
        """alpha of B(alpha) at dimension d; None: not contractive for every x."""
        return None

    def omega(self, d: int) -> float | None:
        """omega of U(omega) at dimension d; None: not unbiased."""
        return None

    def compress(self, x: Any, rng: Random | None = None) -> Message:
        """C(x) on the last dimension, row by row; ``x [..., d]`` is not changed.

        A stack under one generator draws what its rows would have drawn one after the other.

        Args:
            x: float32 or float64, finite; a tensor of torch's may be on any device.
            rng: a generator, or one for each row; None where nothing is drawn.

        Raises:
            ConfigError: x is not such an array.
        """
        x = x.detach() if is_tensor(x) else np.asarray(x)
        known = str(x.dtype).removeprefix("torch.") in map(str, _DTYPES)
        if not known or x.ndim == 0 or 0 in x.shape:
            raise ConfigError(
                f"{self} compresses float32 or float64 of shape [..., d], not {x.dtype} of shape "
                f"{list(x.shape)}"
            )
        *lead, d = x.shape
        if d > MOST_PARAMETERS:
            raise ConfigError(f"{self} compresses rows of at most {MOST_PARAMETERS}, not {d}")
        if not self.apart:
            x = fetch(x)
        rows = (x if is_tensor(x) else np.ascontiguousarray(x)).reshape(-1, d)
        if type(self).__module__.split(".")[0] != "offbeat":  # a user's, which may change it
            rows = library(rows).asarray(rows, copy=True)
        with np.errstate(all="ignore"):
            if not finite(rows):
                raise ConfigError(f"{self} cannot compress what is not finite")
            if not self.draws:
                message = self._compress(rows, _NO_RNG)
            elif isinstance(rng, np.random.Generator) and (self.batched or len(rows) == 1):
                message = self._compress(rows, rng)
            elif isinstance(rng, np.random.Generator):
                message = Stack([self._compress(row[None], rng) for row in rows])
            elif rng is not None and len(rng) == len(rows):
                pairs = zip(rows, rng, strict=True)
                message = Stack([self._compress(row[None], g) for row, g in pairs])
            else:
                raise ConfigError(f"{self} draws: give a generator, or one for each row")
        message.lead = tuple(lead)
        return message

    @abstractmethod
    def _compress(self, x: Any, rng: np.random.Generator) -> Message:
        """C of ``x [n, d]``, finite and contiguous; must not keep a view of it."""

    def __str__(self) -> str:
        return str(self.spec or type(self).__name__)


_NO_RNG = np.random.default_rng(0)  # stands in where nothing is drawn


def made(what: "str | Compressor") -> Compressor:
    """A compressor, or the one a text names."""
    return COMPRESSORS.parse(what) if isinstance(what, str) else what


def error_of(compressor: Compressor, d: int) -> float:
    """E ||C(x) - x||^2 / E ||x||^2, measured, of small Gaussian x ``[d]``.

    Bounds hold for the worst x, which most are far from: qsgd(16)'s omega reaches 1 at d = 256,
    its error of a Gaussian at 1,600.
    """
    d = min(d, MOST_MEASURED)
    rng = np.random.default_rng(0)
    rows = min(ROWS_MEASURED, MOST_MEASURED // d)
    x = rng.standard_normal((rows, d), np.float32) * np.float32(1e-6)  # far below any threshold
    apart = compressor.compress(x, rng).dense() - x
    return float(np.vecdot(apart, apart).sum() / np.vecdot(x, x).sum())


def nest(*inner: Compressor) -> int:
    """The depth of messages that hold those of ``inner``."""
    depth = 1 + max(one.depth for one in inner)
    if depth > MOST_NESTING:
        raise ConfigError(f"compressors nest {depth} deep; at most {MOST_NESTING} is read")
    return depth


def pieces(n: int, d: int) -> Iterator[tuple[slice, slice]]:
    """``[n, d]`` row by row in pieces that fit a cache: whole rows or parts of one."""
    rows, columns = max(1, CHUNK // d), min(d, CHUNK)
    for i in range(0, n, rows):
        for j in range(0, d, columns):
            yield slice(i, i + rows), slice(j, j + columns)


def overflow(compressor: Compressor, values: Any) -> None:
    """Refuse scales that the dtype of x cannot hold."""
    if not library(values).isfinite(values).all():
        raise ConfigError(f"{compressor} met numbers too large for {dtype_of(values)}")
