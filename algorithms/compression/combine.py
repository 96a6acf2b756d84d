"""Compressors made of compressors: one after another, scaled, and with a correction.

*compose*: what a sparsifier T in B(a) keeps is compressed in turn.  T keeps coordinates as they
are, so errors on kept and dropped ones add: C in B(b) gives alpha = a b, and Q in U(omega), scaled
by 1 / (1 + omega), alpha = a / (1 + omega): Qsparse-local-SGD (Basu et al., NeurIPS 2019,
arXiv:1906.02367).  Unbiased rand-k and Q give an unbiased one with
1 + omega = (1 + omega_T)(1 + omega_Q).

*contractive*: Q / (1 + omega) is in B(1 / (1 + omega)).

*induced*: C(x) + Q(x - C(x)) is in U(omega (1 - alpha)): Horvath and Richtarik, A better
alternative to error feedback, ICLR 2021 (arXiv:2006.11077).
"""

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offbeat.algorithms.compression.coding import BitReader
from offbeat.algorithms.compression.contract import (
    COMPRESSORS,
    Coded,
    Compressor,
    Message,
    codec,
    made,
    nest,
    nested,
    overflow,
)
from offbeat.algorithms.compression.sparse import Sparsifier
from offbeat.runtime.base.errors import ConfigError, PeerError


def whole(source: BitReader, depth: int, dtype: np.dtype, d: int) -> Message:
    """A message of just d numbers inside a message."""
    inner = nested(source, depth, dtype, d)
    if inner.d != d:
        raise PeerError(f"a frame holds {inner.d} numbers where {d} belong")
    return inner


@codec(8)
class Scaled(Coded):
    """A factor times a message."""

    def __init__(self, factor: float, inner: Message) -> None:
        super().__init__(inner.n, inner.d, inner.dtype)
        self.factor, self.inner = factor, inner

    def _rows(self) -> NDArray:
        return self.inner._rows() * self.dtype.type(self.factor)

    def _there(self, device: Any) -> Any:
        return self.inner._there(device) * float(self.dtype.type(self.factor))

    def _sizes(self) -> NDArray[np.int64]:
        return 8 + self.inner.sizes

    def _payloads(self) -> list[bytes]:
        return [struct.pack("<d", self.factor) + frame for frame in self.inner.encode()]

    @classmethod
    def _read(cls, source: BitReader, d: int, dtype: np.dtype, depth: int) -> Message:
        factor = float(source.array("<f8", 1)[0])
        if not 0 < factor <= 1:
            raise PeerError(f"a frame has the factor {factor}, not one of (0, 1]")
        return cls(factor, whole(source, depth, dtype, d))


class Contractive(Compressor):
    """Q / (1 + omega)."""

    def __init__(self, inner: Compressor) -> None:
        if inner.omega(1) is None:
            raise ConfigError(f'"contractive" scales an unbiased compressor, and {inner} is not')
        self.inner, self.draws, self.batched = inner, inner.draws, inner.batched
        self.apart, self.depth = inner.apart, nest(inner)

    def _factor(self, d: int) -> float:
        omega = self.inner.omega(d)
        assert omega is not None
        return 1 / (1 + omega)

    def alpha(self, d: int) -> float:
        """1 / (1 + omega)."""
        return self._factor(d)

    def _compress(self, x: Any, rng: np.random.Generator) -> Message:
        return Scaled(self._factor(x.shape[1]), self.inner._compress(x, rng))


@COMPRESSORS.register("contractive")
def contractive(inner: str | Compressor) -> Contractive:
    """An unbiased compressor divided by 1 + omega."""
    return Contractive(made(inner))


class Composed(Compressor):
    """A sparsifier, then a compressor of the values it keeps."""

    def __init__(self, first: Sparsifier, then: Compressor) -> None:
        self.first, self.then = first, then
        if first.omega(1) is None and then.alpha(1) is None and then.omega(1) is not None:
            self.then = Contractive(then)
        self.apart, self.depth = first.apart, nest(self.then)
        self.draws = first.draws or self.then.draws
        self.batched = not (first.draws and self.then.draws) and self.then.batched

    def alpha(self, d: int) -> float | None:
        """The product of the two; values of which fewer are kept have no smaller alpha."""
        a, b = self.first.alpha(d), self.then.alpha(self.first.kept(d))
        return None if a is None or b is None else a * b

    def omega(self, d: int) -> float | None:
        """(1 + omega_T)(1 + omega_Q) - 1."""
        a, b = self.first.omega(d), self.then.omega(self.first.kept(d))
        return None if a is None or b is None else (1 + a) * (1 + b) - 1

    def _compress(self, x: Any, rng: np.random.Generator) -> Message:
        return self.first.sparsify(x, rng, self.then)


@COMPRESSORS.register("compose")
def compose(first: str | Compressor, then: str | Compressor) -> Composed:
    """A sparsifier whose kept values another compresses, as compose(topk(0.01), bf16)."""
    one, two = made(first), made(then)
    if not isinstance(one, Sparsifier):
        raise ConfigError(
            f"compose begins with a compressor that keeps coordinates; {one} does not"
        )
    if one.omega(1) is not None and two.omega(1) is None:
        raise ConfigError(f"compose: {one} is unbiased, {two} is not; take a contractive first")
    return Composed(one, two)


@codec(9)
class Sum(Coded):
    """Two messages, added."""

    def __init__(self, one: Message, two: Message) -> None:
        super().__init__(one.n, one.d, one.dtype)
        self.one, self.two = one, two

    def _rows(self) -> NDArray:
        return self.one._rows() + self.two._rows()

    def _sizes(self) -> NDArray[np.int64]:
        return self.one.sizes + self.two.sizes

    def _payloads(self) -> list[bytes]:
        return [a + b for a, b in zip(self.one.encode(), self.two.encode(), strict=True)]

    @classmethod
    def _read(cls, source: BitReader, d: int, dtype: np.dtype, depth: int) -> Message:
        return cls(whole(source, depth, dtype, d), whole(source, depth, dtype, d))


class Induced(Compressor):
    """C(x) + Q(x - C(x))."""

    def __init__(self, biased: Compressor, unbiased: Compressor) -> None:
        if biased.alpha(1) is None or unbiased.omega(1) is None:
            raise ConfigError(
                f"induced takes a contractive and an unbiased compressor, not {biased} and "
                f"{unbiased}"
            )
        self.biased, self.unbiased = biased, unbiased
        self.depth = nest(biased, unbiased)
        self.draws = biased.draws or unbiased.draws
        self.batched = not (biased.draws and unbiased.draws) and (
            biased.batched and unbiased.batched
        )

    def omega(self, d: int) -> float:
        """omega (1 - alpha)."""
        alpha, omega = self.biased.alpha(d), self.unbiased.omega(d)
        assert alpha is not None
        assert omega is not None
        return omega * (1 - alpha)

    def _compress(self, x: NDArray, rng: np.random.Generator) -> Message:
        one = self.biased._compress(x, rng)
        both = Sum(one, self.unbiased._compress(x - one._rows(), rng))
        if not np.isfinite(np.vecdot(x, x)).all():
            overflow(self, both._rows())
        return both


@COMPRESSORS.register("induced")
def induced(biased: str | Compressor, unbiased: str | Compressor) -> Induced:
    """C(x) + Q(x - C(x)), unbiased with less variance than Q, as induced(topk(0.1), qsgd)."""
    return Induced(made(biased), made(unbiased))
