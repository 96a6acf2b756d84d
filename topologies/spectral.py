"""Spectral facts: how fast a topology brings its nodes to agree.

J = 11^T/n; one round of a doubly stochastic W shrinks the distance to the mean at least by
||W - J||_2, for a symmetric W its SLEM (second largest eigenvalue modulus).
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.base.randomness import rng
from offbeat.topologies.contract import Topology

DENSE = 2000  # nodes up to which matrices are made dense
EXACT = 1e-12  # the largest entry of what is called zero
CONSENSUS = 1e-6
WINDOW = 32  # rounds from which a sequence without period is judged
RESTARTS = 300  # of Lanczos, at most
NEXT = 1e-8  # how far from an eigenvalue W is factorised
PROBES = 4  # random columns that stand for a large identity matrix


def slem(matrix: sparse.sparray | NDArray) -> float:
    """||W - J||_2 of W ``[n, n]``; for symmetric W, max(|lambda_2|, |lambda_n|)."""
    return _deflated_norm([sparse.csr_array(matrix)])


def spectral_gap(matrix: sparse.sparray | NDArray) -> float:
    """rho = 1 - SLEM of W ``[n, n]``."""
    return 1 - slem(matrix)


def effective_gap(topology: Topology, rounds: int) -> float:
    """1 - ||prod_{k < rounds} (W_k - J)||_2^(1/rounds): the gap a fixed W of equal speed has."""
    norm = _deflated_norm([topology.matrix(k) for k in range(rounds)])
    return 1 - norm ** (1 / rounds)


def consensus_length(topology: Topology) -> int | None:
    """Rounds from 0 after which everyone has the exact mean; None if no period brings it.

    Exact is |W_{k-1} ... W_0 - J| <= 1e-12 everywhere; beyond 2000 nodes, random vectors stand
    for all of them.
    """
    product = _start(topology.n)
    mean = product.mean(axis=0)
    for k in range(topology.period or 0):
        product = topology.matrix(k) @ product
        if np.abs(product - mean).max() <= EXACT:
            return k + 1
    return None


def facts(topology: Topology) -> dict[str, Any]:
    """What there is to say about a topology.

    ``edges`` and ``connected`` are of all edges of a period (or of the first 32 rounds of a
    sequence without one) together, ``degree_min`` and ``degree_max`` are of single rounds,
    ``gap`` is the effective one, ``rounds_to_1e-6`` what this gap needs to shrink any distance
    to the mean by 1e-6, ``exact_after`` the consensus length.
    """
    window = topology.period or WINDOW
    matrices = [topology.matrix(k) for k in range(window)]
    n = topology.n
    off = [abs(w) - sparse.diags_array(abs(w.diagonal())) for w in matrices]
    degrees = np.array([np.bincount(w.nonzero()[0], minlength=n) for w in off])
    union = sparse.csr_array(sum(off[1:], start=off[0]))
    union.eliminate_zeros()
    pieces, _ = sparse.csgraph.connected_components(union, topology.directed, "strong")
    gap = effective_gap(topology, window)
    exact = consensus_length(topology)
    return {
        "n": n,
        "edges": union.nnz if topology.directed else union.nnz // 2,
        "degree_min": int(degrees.min()),
        "degree_max": int(degrees.max()),
        "connected": pieces == 1,
        "symmetric": all(abs(w - w.T).max() <= EXACT for w in matrices),
        "doubly_stochastic": all(_doubly_stochastic(w) for w in matrices),
        "gap": gap,
        "rounds_to_1e-6": exact or rounds_to(CONSENSUS, gap),
        "period": topology.period,
        "exact_after": exact,
    }


def rounds_to(fraction: float, gap: float) -> int | None:
    """Rounds that shrink any distance to the mean to ``fraction``; None if no number does.

    >>> rounds_to(1e-6, 0.5)
    20
    """
    if gap >= 1:
        return 1
    return math.ceil(math.log(fraction) / math.log1p(-gap)) if gap > EXACT else None


def laplacian_ends(laplacian: sparse.sparray) -> tuple[float, float]:
    """mu_2 and mu_n of a graph's Laplacian ``[n, n]``."""
    n = laplacian.shape[0]
    if n <= DENSE:
        values = np.linalg.eigvalsh(laplacian.toarray())
        return float(values[1]), float(values[-1])
    high = float(eigsh(laplacian, 1, which="LA", v0=_vector(n), return_eigenvectors=False)[0])
    # The matrix I - L/mu_n has its eigenvalues in [0, 1] and mu_2 at its second largest.
    second = slem(sparse.eye_array(n) - laplacian / high)
    return high * (1 - second), high


def _doubly_stochastic(w: sparse.csr_array) -> bool:
    sums = np.concatenate([w.sum(axis=0), w.sum(axis=1)])
    return bool(w.data.min() >= -EXACT and np.abs(sums - 1).max() <= 1e-9)


def _start(n: int) -> NDArray:
    return np.eye(n) if n <= DENSE else rng(0, "probe").standard_normal((n, PROBES))


def _vector(n: int) -> NDArray:
    return rng(0, "lanczos").standard_normal(n)


def _deflated_norm(matrices: Sequence[sparse.csr_array]) -> float:
    """||prod (W_k - J)||_2, the first W applied first."""
    n = matrices[0].shape[0]
    if n <= DENSE:
        return _two_norm(_apply(matrices, np.eye(n)))
    if not _apply(matrices, _vector(n)).any():
        return 0.0
    try:
        if len(matrices) == 1 and abs(matrices[0] - matrices[0].T).max() <= EXACT:
            return _large_slem(matrices[0])
        return _large_norm(matrices)
    except ArpackNoConvergence:
        raise ConfigError(
            f"the spectral gap of this graph of {n} nodes is too small to be computed"
        ) from None


def _apply(matrices: Sequence[Any], y: NDArray) -> NDArray:
    """prod (W_k - J) y."""
    y = y - y.mean(axis=0)
    for w in matrices:
        before = np.linalg.norm(y)
        y = w @ y
        y -= y.mean(axis=0)  # every round: else rounding errors of the mean would stay
        if np.linalg.norm(y) <= EXACT * before:
            return np.zeros_like(y)  # this round has made it J; what is left is rounding
    return y


def _two_norm(y: NDArray) -> float:
    """||Y||_2 by the top eigenvalue of Y^T Y: several times faster than singular values."""
    scale = np.abs(y).max()
    if scale == 0:
        return 0.0
    y = y / scale
    top = np.linalg.eigvalsh(y.T @ y)[-1]
    return float(scale) * math.sqrt(max(0.0, float(top)))


def _large_norm(matrices: Sequence[sparse.csr_array]) -> float:
    n = matrices[0].shape[0]
    back = [w.T for w in reversed(matrices)]
    gram = LinearOperator((n, n), matvec=lambda x: _apply(back, _apply(matrices, x)), dtype=float)
    squared = eigsh(gram, 1, v0=_vector(n), maxiter=RESTARTS, return_eigenvectors=False)[0]
    return math.sqrt(max(0.0, float(squared)))


def _large_slem(w: sparse.csr_array) -> float:
    """SLEM of a large symmetric W."""
    n = w.shape[0]
    deflated = LinearOperator((n, n), matvec=lambda x: _apply([w], x), dtype=float)
    found: dict[str, Any] = {"v0": _vector(n), "return_eigenvectors": False, "maxiter": RESTARTS}
    try:
        return float(abs(eigsh(deflated, 1, which="LM", **found)[0]))
    except ArpackNoConvergence:
        # A tiny gap: a ring, a path, a grid.  They have few edges, so factorising W - sigma I is
        # cheap, and the eigenvalues next to sigma come out at once.
        second = float(eigsh(w.tocsc(), 2, sigma=1 + NEXT, **found).min())
    if 1 - 2 * w.diagonal().min() <= second:  # Gershgorin's bound on -lambda_n
        return second
    return max(second, -float(eigsh(w.tocsc(), 1, sigma=-1 - NEXT, **found)[0]))
