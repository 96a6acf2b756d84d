"""PowerSGD: the d numbers as a matrix M, of which a projection of rank r travels in two factors.

Vogels, Karimireddy, Jaggi, PowerSGD, NeurIPS 2019 (arXiv:1905.13727), algorithm 1:

    P = orthonormal(M Q),   Q = M^T P,   C(x) = P Q^T = P P^T M.

Q starts as a Gaussian that only the sender draws, and each further step of power iteration brings
it nearer to the leading singular vectors.  The paper starts from the last message's Q instead;
compressors keep no state, so steps stand in for it.

C(x) is an orthogonal projection of M: ||C(x) - x||^2 = ||x||^2 - ||C(x)||^2, whatever Q.  In
expectation alpha = r / m, m = min(rows, columns): with sigma_i, u_i the singular values and left
vectors of M and pi_i = ||P^T u_i||^2, which sum to r,

    E ||C(x)||^2 = sum_i sigma_i^2 E pi_i  >=  (r / m) ||x||^2,

as E pi_i grows with sigma_i: exchange the Gaussians of two singular vectors, and the one of more
weight has the larger share.  It is attained where all singular values are equal.
"""

import math

import numpy as np
from numpy.typing import NDArray

from offbeat.algorithms.compression.coding import BitReader
from offbeat.algorithms.compression.contract import (
    COMPRESSORS,
    Coded,
    Compressor,
    Message,
    codec,
    overflow,
)
from offbeat.runtime.base.errors import PeerError
from offbeat.runtime.base.registry import Count


@codec(13)
class Factors(Coded):
    """P Q^T, row by row, cut to d."""

    def __init__(self, d: int, p: NDArray, q: NDArray) -> None:
        super().__init__(len(p), d, p.dtype)
        self.p, self.q = p, q  # [n, r, rows], [n, r, columns]

    def _rows(self) -> NDArray:
        # Term by term and not by a library's product, whose order of summation is its own.
        out = self.p[:, 0, :, None] * self.q[:, 0, None, :]
        for i in range(1, self.p.shape[1]):
            out += self.p[:, i, :, None] * self.q[:, i, None, :]
        return out.reshape(self.n, -1)[:, : self.d]

    def _sizes(self) -> int:
        return 8 + self.dtype.itemsize * (self.p[0].size + self.q[0].size)

    def _payloads(self) -> list[bytes]:
        wire = self.dtype.newbyteorder("<")
        _, r, columns = self.q.shape
        head = r.to_bytes(4, "little") + columns.to_bytes(4, "little")
        return [
            head + p.astype(wire, copy=False).tobytes() + q.astype(wire, copy=False).tobytes()
            for p, q in zip(self.p, self.q, strict=True)
        ]

    @classmethod
    def _read(cls, source: BitReader, d: int, dtype: np.dtype, depth: int) -> Message:
        r, columns = source.number("<u4"), source.number("<u4")
        rows = -(-d // max(columns, 1))
        if not (1 <= columns <= d and 1 <= r <= min(rows, columns)):
            raise PeerError(f"a frame has {d} numbers as rank {r} of {columns} columns")
        wire = dtype.newbyteorder("<").str
        p = source.array(wire, r * rows).astype(dtype, copy=False)
        q = source.array(wire, r * columns).astype(dtype, copy=False)
        return cls(d, p.reshape(1, r, rows), q.reshape(1, r, columns))


class PowerSGD(Compressor):
    """A random projection of rank r."""

    def __init__(self, r: int, columns: int | None, steps: int) -> None:
        self.r, self.columns, self.steps = r, columns, steps

    def shape(self, d: int) -> tuple[int, int]:
        """Rows and columns of M, of which zeros fill the last row."""
        columns = min(self.columns or math.isqrt(d - 1) + 1, d)
        return -(-d // columns), columns

    def alpha(self, d: int) -> float:
        """r / min(rows, columns)."""
        return min(1.0, self.r / min(self.shape(d)))

    def _compress(self, x: NDArray, rng: np.random.Generator) -> Message:
        n, d = x.shape
        rows, columns = self.shape(d)
        r = min(self.r, rows, columns)
        m = np.zeros((n, rows * columns), x.dtype)
        top = np.abs(x).max(axis=-1, keepdims=True)
        m[:, :d] = x / np.where(top > 0, top, 1)  # products of large numbers could be too large
        m = m.reshape(n, rows, columns)
        q = rng.standard_normal((n, columns, r), x.dtype)
        for step in range(self.steps):
            p, _ = np.linalg.qr(m @ q)
            q = m.mT @ p
            if step + 1 < self.steps:
                q, _ = np.linalg.qr(q)
        q = q * top[:, :, None]
        overflow(self, r * q)  # which bounds every sum of terms: those of P are 1 at most
        return Factors(d, np.ascontiguousarray(p.mT), np.ascontiguousarray(q.mT))


@COMPRESSORS.register("powersgd")
def powersgd(r: Count = 2, columns: Count | None = None, *, steps: Count = 1) -> PowerSGD:
    """Rank ``r`` of the numbers as rows of ``columns`` (as square as can be), in power steps."""
    return PowerSGD(r, columns, steps)
