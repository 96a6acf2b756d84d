"""Mixing weights: from a graph to a doubly stochastic W, and the check of one that is given.

W[i, j] is the weight with which node i takes node j's vector: x_i <- sum_j W[i, j] x_j.
"""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeAlias

import networkx as nx
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.base.registry import Registry
from offbeat.topologies.contract import graph_of
from offbeat.topologies.spectral import laplacian_ends

WEIGHTS = Registry("weights")
TOLERANCE = 1e-9  # of sums of rows and columns, and of symmetry
NAMED = 5  # members of a component that an error names

Weights: TypeAlias = str | np.ndarray | sparse.sparray  # a rule's text, or a matrix


class Parallel(tuple):
    """The values of an attribute in which parallel edges differ."""


class Edges:
    """A graph on nodes 0..n-1 as arrays, without loops, each edge once.

    Args:
        n: nodes.
        src, dst: ``[m]``, the edges src -> dst, or {src, dst}.
        directed: whether they go one way.
        graph: the same as a networkx graph, where there is one.
        names: ``[n]``, what errors call the nodes.
    """

    def __init__(
        self,
        n: int,
        src: ArrayLike,
        dst: ArrayLike,
        *,
        directed: bool = False,
        graph: nx.Graph | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self.n, self.directed, self._graph = n, directed, graph
        self.names: Sequence[object] = range(n) if names is None else names
        src, dst = np.ravel(src).astype(np.int32), np.ravel(dst).astype(np.int32)  # as scipy's own
        if not directed:
            src, dst = np.concatenate([src, dst]), np.concatenate([dst, src])
        other = src != dst
        place = dst[other], src[other]
        hears = sparse.coo_array((np.ones(len(place[0])), place), shape=(n, n)).tocsr()
        hears.data[:] = 1  # parallel edges are not two
        self.hears = hears
        """``[n, n]``: 1 at (i, j) where i hears j."""

    @staticmethod
    def of(graph: nx.Graph, names: Sequence[str] | None = None) -> "Edges":
        """The edges of a networkx graph on 0..n-1."""
        src, dst = np.array(list(graph.edges()), int).reshape(-1, 2).T
        return Edges(len(graph), src, dst, directed=graph.is_directed(), graph=graph, names=names)

    @cached_property
    def graph(self) -> nx.Graph:
        """The networkx graph."""
        return graph_of(self.hears, self.directed) if self._graph is None else self._graph

    def pieces(self) -> tuple[int, NDArray]:
        """How many (strongly) connected components there are, and each node's, ``[n]``."""
        return sparse.csgraph.connected_components(self.hears, self.directed, "strong")


Rule = Callable[[Edges], sparse.csr_array]


def weigh(
    graph: nx.Graph | Edges, weights: Weights = "metropolis", *, allow_disconnected: bool = False
) -> sparse.csr_array:
    """W ``[n, n]`` for ``graph`` on nodes 0..n-1.

    Args:
        graph: undirected or directed.
        weights: the text of a rule, as ``"lazy(best-constant)"``, or W itself.
        allow_disconnected: else a graph in several pieces is an error.

    Raises:
        ConfigError: pieces, an unknown rule, a rule that does not suit the graph, a W that is
            not doubly stochastic or has weight where there is no edge.
    """
    edges = graph if isinstance(graph, Edges) else Edges.of(graph)
    if not allow_disconnected:
        check_connected(edges)
    if isinstance(weights, str):
        return WEIGHTS.parse(weights)(edges)
    check(weights, symmetric=not edges.directed, graph=edges)
    return sparse.csr_array(weights, copy=True)


def check_connected(edges: Edges) -> None:
    """Refuse a graph in several pieces.

    Raises:
        ConfigError: names their sizes and a few members of the smaller ones.
    """
    count, of = edges.pieces()
    if count == 1:
        return
    pieces = sorted((np.flatnonzero(of == k).tolist() for k in range(count)), key=len, reverse=True)
    sizes = ", ".join(str(len(piece)) for piece in pieces[:NAMED])
    apart = "; ".join(
        ", ".join(str(edges.names[i]) for i in piece[:NAMED])
        + (", ..." if len(piece) > NAMED else "")
        for piece in pieces[1 : 1 + NAMED]
    )
    more = ", ..." if len(pieces) > NAMED else ""
    raise ConfigError(
        f"the graph is in {len(pieces)} components, of {sizes}{more} nodes; cut off from the "
        f"largest: {apart}; add edges, or pass allow_disconnected=True"
    )


def check(
    matrix: ArrayLike | sparse.sparray,
    *,
    symmetric: bool = False,
    graph: nx.Graph | Edges | None = None,
    names: Sequence[object] | None = None,
) -> None:
    """Refuse a matrix that is not doubly stochastic.

    Args:
        matrix: W ``[n, n]``.
        symmetric: whether it must equal its transpose.
        graph: where given, weight is allowed on its edges and the diagonal only.
        names: ``[n]``, what errors call the nodes; the graph's, or numbers.

    Raises:
        ConfigError: a sentence with the worst row (or column) and its sum.

    >>> check([[0.5, 0.5], [0.5, 0.5]], symmetric=True)
    >>> check([[0.5, 0.5], [0.1, 0.8]])
    Traceback (most recent call last):
    ...
    offbeat.ConfigError: mixing matrix: row 1 sums to 0.9; every row and every \
column must sum to 1
    """
    w: Any = matrix if sparse.issparse(matrix) else np.asarray(matrix)
    if not np.can_cast(w.dtype, np.float64, "same_kind"):
        raise ConfigError(f"mixing matrix: it must be of numbers, not of {w.dtype}")
    w = w.astype(np.float64)
    if w.ndim != 2 or w.shape[0] != w.shape[1] or not w.shape[0]:
        raise ConfigError(f"mixing matrix: it must be n x n, not {list(w.shape)}")
    edges = Edges.of(graph) if isinstance(graph, nx.Graph) else graph
    if edges is not None and edges.n != w.shape[0]:
        raise ConfigError(f"mixing matrix: {list(w.shape)} for {edges.n} nodes")
    called = names or (range(w.shape[0]) if edges is None else edges.names)
    w = sparse.csr_array(w)
    sums = {"row": w.sum(axis=1), "column": w.sum(axis=0)}

    def refuse(wrong: sparse.sparray, what: Callable[[int, int], str]) -> None:
        """Name the largest entry of ``wrong``, if it has one."""
        found = sparse.coo_array(wrong)
        if found.nnz and found.data.max() > 0:
            i, j = (int(place[found.data.argmax()]) for place in found.coords)
            raise ConfigError(
                f"mixing matrix: row {called[i]} has the weight {w[i, j]:.6g} for node "
                f"{called[j]}, {what(i, j)} (the row sums to {sums['row'][i]:.6g})"
            )

    bad = w.copy()
    bad.data = (~np.isfinite(w.data)).astype(float)
    refuse(bad, lambda i, j: "which is no number")
    refuse(-w, lambda i, j: "which is negative")
    for name, of in sums.items():
        worst = int(np.abs(of - 1).argmax())
        if abs(of[worst] - 1) > TOLERANCE:
            raise ConfigError(
                f"mixing matrix: {name} {called[worst]} sums to {of[worst]:.10g}; every row and "
                "every column must sum to 1"
            )
    if symmetric and abs(apart := w - w.T).max() > TOLERANCE:
        refuse(apart, lambda i, j: f"which has {w[j, i]:.6g} for it; here W must be symmetric")
    if edges is not None:
        allowed = edges.hears + sparse.eye_array(edges.n)
        refuse(w - w * allowed, lambda i, j: "with which it shares no edge")


def with_diagonal(off: sparse.sparray) -> sparse.csr_array:
    """``off [n, n]`` with the diagonal that makes rows sum to 1."""
    return sparse.csr_array(off + sparse.diags_array(1 - np.asarray(off.sum(axis=1)).ravel()))


def pairwise(n: int, i: NDArray, j: NDArray, w: ArrayLike) -> sparse.csr_array:
    """Symmetric W ``[n, n]`` with the weights ``w [m]`` on the edges {``i [m]``, ``j [m]``}."""
    w = np.broadcast_to(np.asarray(w, float), np.shape(i))
    both = np.concatenate([i, j]), np.concatenate([j, i])
    return with_diagonal(sparse.coo_array((np.concatenate([w, w]), both), shape=(n, n)))


def metropolis_pairs(n: int, i: NDArray, j: NDArray) -> sparse.csr_array:
    """Metropolis-Hastings weights of the edges {``i [m]``, ``j [m]``} of n nodes."""
    degree = np.bincount(np.concatenate([i, j]), minlength=n)
    return pairwise(n, i, j, 1 / (1 + np.maximum(degree[i], degree[j])))


@WEIGHTS.register("metropolis")
def metropolis() -> Rule:
    """Metropolis-Hastings: 1/(1 + the larger degree); suits every undirected graph."""

    def rule(edges: Edges) -> sparse.csr_array:
        i, j = sparse.triu(_undirected(edges, "metropolis"), k=1).nonzero()
        return metropolis_pairs(edges.n, i, j)

    return rule


@WEIGHTS.register("max-degree")
def max_degree() -> Rule:
    """1/(1 + the largest degree of all) on every edge."""

    def rule(edges: Edges) -> sparse.csr_array:
        a = _undirected(edges, "max-degree")
        return with_diagonal(a / (1 + a.sum(axis=1).max()))

    return rule


@WEIGHTS.register("best-constant")
def best_constant() -> Rule:
    """The equal weight of all edges with the largest gap; a hub's own weight may be negative.

    W = I - 2/(mu_2 + mu_n) L, mu the eigenvalues of the Laplacian L (Xiao and Boyd, Systems &
    Control Letters 2004).
    """

    def rule(edges: Edges) -> sparse.csr_array:
        a = _undirected(edges, "best-constant")
        if a.nnz == 0:
            return with_diagonal(a)
        low, high = laplacian_ends(sparse.diags_array(a.sum(axis=1)) - a)
        return with_diagonal(a * (2 / (low + high)))

    return rule


@WEIGHTS.register("uniform")
def uniform() -> Rule:
    """1/(1 + degree); for graphs whose nodes all have the same degree, directed ones too."""

    def rule(edges: Edges) -> sparse.csr_array:
        a = edges.hears
        hears, heard = a.sum(axis=1), a.sum(axis=0)
        if (ends := (min(hears.min(), heard.min()), max(hears.max(), heard.max())))[0] != ends[1]:
            raise ConfigError(
                f"uniform weights are doubly stochastic only where all degrees are equal, and "
                f"here they go from {ends[0]:.0f} to {ends[1]:.0f}; take metropolis"
            )
        return with_diagonal(a / (1 + ends[0]))

    return rule


@WEIGHTS.register("attribute")
def attribute(name: str = "weight") -> Rule:
    """The edges' attribute of this name; the diagonal takes what is missing to 1."""

    def rule(edges: Edges) -> sparse.csr_array:
        graph = edges.graph
        for i, j, value in graph.edges(data=name):
            edge = f"weights: edge {edges.names[i]}, {edges.names[j]} has"
            if isinstance(value, Parallel):
                said = " and ".join(map(str, value[:NAMED]))
                raise ConfigError(f'{edge} {said} as its "{name}"; give one weight an edge')
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value):
                raise ConfigError(f'{edge} {value!r} as its "{name}", which is no number')
        nodes = range(edges.n)
        given = nx.to_scipy_sparse_array(graph, nodelist=nodes, weight=name, dtype=float)
        matrix = with_diagonal(sparse.csr_array(given.T))
        check(matrix, symmetric=not edges.directed, names=edges.names)
        return matrix

    return rule


@WEIGHTS.register("lazy")
def lazy(of: str = "metropolis") -> Rule:
    """(I + W)/2 of another rule's W: no negative eigenvalue, about half the gap."""
    inner = WEIGHTS.parse(of)
    return lambda edges: sparse.csr_array((sparse.eye_array(edges.n) + inner(edges)) / 2)


def _undirected(edges: Edges, rule: str) -> sparse.csr_array:
    if edges.directed:
        raise ConfigError(f"{rule} weights need an undirected graph; take uniform or lazy(uniform)")
    return edges.hears
