"""Fixed graphs: as arrays, which a hundred thousand nodes need, or by networkx.

Whatever networkx can make, ``from_networkx`` takes.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, TypeVar

import networkx as nx
import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import sparse

from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.base.randomness import rng
from offbeat.runtime.base.registry import Count, Natural, Positive, Seed
from offbeat.topologies.contract import TOPOLOGIES, Topology, finished
from offbeat.topologies.weights import TOLERANCE, Edges, Parallel, Weights, check, weigh

MAX_DRAWS = 100  # of a random graph, until one is connected

T = TypeVar("T")
Probability = Annotated[float, Field(ge=0, le=1)]


def from_networkx(
    graph: nx.Graph, weights: Weights = "metropolis", *, allow_disconnected: bool = False
) -> Topology:
    """A fixed topology from any networkx graph.

    Nodes become 0..n-1 in the graph's order (and keep their names, ``Topology.names``), loops are
    dropped, and of parallel edges all but one, which must agree in what is their weight.

    Args:
        graph: undirected or directed.
        weights: a rule's text, such as ``"lazy(best-constant)"`` or ``"attribute(weight)"``, or W
            ``[n, n]`` itself.
        allow_disconnected: else a graph in several pieces is an error.

    Raises:
        ConfigError: no nodes, pieces, or weights that do not suit the graph.

    >>> import networkx as nx
    >>> from_networkx(nx.path_graph(2)).matrix().toarray().tolist()
    [[0.5, 0.5], [0.5, 0.5]]
    >>> from_networkx(nx.empty_graph(2))
    Traceback (most recent call last):
    ...
    offbeat.ConfigError: the graph is in 2 components, of 1, 1 nodes; cut off from \
the largest: 1; add edges, or pass allow_disconnected=True
    """
    if not len(graph):
        raise ConfigError("the graph has no nodes")
    written = [str(node) for node in graph]
    names = None if written == [str(i) for i in range(len(graph))] else written
    if not _plain(graph):
        graph = _single(graph)
    own = None if _plain(graph) else lambda k: graph
    return _fixed(Edges.of(graph, names), weights, own, allow_disconnected, names)


def _single(graph: nx.Graph) -> nx.Graph:
    """``graph`` on 0..n-1, without loops and parallel edges."""
    number = {node: at for at, node in enumerate(graph)}
    made: nx.Graph = nx.DiGraph() if graph.is_directed() else nx.Graph()
    for node, facts in graph.nodes.items():
        made.add_node(number[node], **{"label": node, **facts})
    for u, v, facts in graph.edges(data=True):
        i, j = number[u], number[v]
        if i != j and made.has_edge(i, j):
            one = made.edges[i, j]
            for key in one.keys() | facts.keys():
                if not np.array_equal(one.get(key), facts.get(key)):
                    first = one[key] if isinstance(one.get(key), Parallel) else (one.get(key),)
                    one[key] = Parallel((*first, facts.get(key)))
        elif i != j:
            made.add_edge(i, j, **facts)
    return made


def _fixed(
    edges: Edges,
    weights: Weights,
    graph: Callable[[int], nx.Graph] | None = None,
    allow_disconnected: bool = False,
    names: Sequence[str] | None = None,
) -> Topology:
    """The topology of ``edges``; ``graph`` where a graph says more than they do."""
    matrix = finished(weigh(edges, weights, allow_disconnected=allow_disconnected))
    if graph is None and matrix.nnz - np.count_nonzero(matrix.diagonal()) < edges.hears.nnz:
        graph = lambda k: edges.graph  # noqa: E731 - which has edges without weight
    return Topology(edges.n, lambda k: matrix, graph=graph, directed=edges.directed, names=names)


def _plain(graph: nx.Graph) -> bool:
    """Whether the graph is its edges between 0..n-1, and nothing more."""
    return (
        not graph.is_multigraph()
        and all(node == i and not facts for i, (node, facts) in enumerate(graph.nodes.items()))
        and not any(facts for *_, facts in graph.edges(data=True))
        and not nx.number_of_selfloops(graph)
    )


def from_matrix(matrix: NDArray | sparse.sparray, names: Sequence[str] | None = None) -> Topology:
    """A fixed topology from a doubly stochastic W ``[n, n]``, symmetric or not, of ``names [n]``.

    Raises:
        ConfigError: W is not doubly stochastic; names the worst row.
    """
    check(matrix, names=names)
    w = sparse.csr_array(matrix, dtype=np.float64, copy=True)
    directed = abs(w - w.T).max() > TOLERANCE
    return Topology(w.shape[0], lambda k: w, directed=directed, names=names)


@TOPOLOGIES.register("ring")
def ring(n: Count, weights: Weights = "metropolis") -> Topology:
    """A circle."""
    return _fixed(_circulant(n, [1]), weights)


@TOPOLOGIES.register("path")
def path(n: Count, weights: Weights = "metropolis") -> Topology:
    """A line."""
    return _fixed(Edges(n, np.arange(n - 1), np.arange(1, n)), weights)


@TOPOLOGIES.register("star")
def star(n: Count, weights: Weights = "metropolis") -> Topology:
    """Node 0 in the middle of all others."""
    edges = Edges(n, np.zeros(n - 1, int), np.arange(1, n))
    return _fixed(edges, weights, lambda k: _placed(edges, {0: (0, 0)}))


@TOPOLOGIES.register("complete")
def complete(n: Count, weights: Weights = "metropolis") -> Topology:
    """Everyone with everyone: W = J."""
    return _fixed(Edges(n, *np.triu_indices(n, 1)), weights)


@TOPOLOGIES.register("grid")
def grid(rows: Count, columns: Count, weights: Weights = "metropolis") -> Topology:
    """A rectangle."""
    at = np.arange(rows * columns).reshape(rows, columns)
    edges = Edges(at.size, np.append(at[:-1], at[:, :-1]), np.append(at[1:], at[:, 1:]))

    def graph(k: int) -> nx.Graph:
        return _placed(edges, {i: (i % columns, -(i // columns)) for i in range(edges.n)})

    return _fixed(edges, weights, graph)


@TOPOLOGIES.register("torus")
def torus(rows: Count, columns: Count, weights: Weights = "metropolis") -> Topology:
    """A rectangle whose opposite sides are joined."""
    at = np.arange(rows * columns).reshape(rows, columns)
    return _fixed(Edges(at.size, [at, at], [np.roll(at, -1, 0), np.roll(at, -1, 1)]), weights)


@TOPOLOGIES.register("hypercube")
def hypercube(n: Count, weights: Weights = "metropolis") -> Topology:
    """Numbers that differ in one bit are neighbours; n is a power of two."""
    dimension = n.bit_length() - 1
    if n != 2**dimension:
        raise ConfigError(
            f"a hypercube has 2^d nodes, not {n}; take {2**dimension} or {2 ** (dimension + 1)}"
        )
    i = np.tile(np.arange(n), (dimension, 1))
    return _fixed(Edges(n, i, i ^ 2 ** np.arange(dimension)[:, None]), weights)


@TOPOLOGIES.register("exponential")
def exponential(n: Count, weights: Weights = "uniform") -> Topology:
    """Directed: i sends to i + 1, i + 2, i + 4, ... (Ying et al., NeurIPS 2021)."""
    return _fixed(_circulant(n, (2**b for b in range(levels(n))), directed=True), weights)


@TOPOLOGIES.register("undirected-exponential")
def undirected_exponential(n: Count, weights: Weights = "metropolis") -> Topology:
    """Neighbours at the distances 1, 2, 4, ... on a circle."""
    return _fixed(_circulant(n, (2**b for b in range(levels(n)))), weights)


def _circulant(n: int, shifts: Iterable[int], *, directed: bool = False) -> Edges:
    """i sends to i + a modulo n, a in ``shifts``."""
    a = np.array(list(shifts), int)[:, None]
    i = np.tile(np.arange(n), (len(a), 1))
    return Edges(n, i, (i + a) % n, directed=directed)


def _placed(edges: Edges, places: dict[int, tuple[int, int]]) -> nx.Graph:
    """The graph of ``edges``, with places to draw its nodes at."""
    nx.set_node_attributes(edges.graph, places, "pos")
    return edges.graph


def levels(n: int) -> int:
    """ceil(log2 n).

    >>> [levels(n) for n in (1, 2, 3, 8, 9)]
    [0, 1, 2, 3, 4]
    """
    return (n - 1).bit_length()


@TOPOLOGIES.register("erdos-renyi")
def erdos_renyi(
    n: Count, p: Probability = 0.3, weights: Weights = "metropolis", seed: Seed = 0
) -> Topology:
    """Every edge with probability p; drawn again until it is connected."""
    return _connected(lambda g: nx.fast_gnp_random_graph(n, p, g), "erdos-renyi", weights, seed)


@TOPOLOGIES.register("random-regular")
def random_regular(
    n: Count, degree: Natural = 3, weights: Weights = "metropolis", seed: Seed = 0
) -> Topology:
    """Drawn from all connected graphs whose nodes all have this degree."""
    if n * degree % 2 or degree >= n:
        raise ConfigError(
            f"no graph of {n} nodes has the degree {degree} everywhere: "
            "it must be less than n, and n x degree even"
        )

    # Pairs of a dense graph's ends hardly ever fit: what it leaves out is drawn.
    few = min(degree, n - 1 - degree)

    def attempt(g: np.random.Generator) -> Edges | None:
        edges = next(filter(None, (_paired(n, few, g) for _ in range(MAX_DRAWS))), None)
        if edges and few < degree:
            edges = Edges(n, *np.triu(1 - edges.hears.toarray(), k=1).nonzero())
        return edges if edges and edges.pieces()[0] == 1 else None

    return _fixed(_redraw(attempt, "random-regular", seed), weights)


def _paired(n: int, degree: int, g: np.random.Generator) -> Edges | None:
    """The ends of n ``degree``/2 edges, paired at random; those of loops and parallel edges again.

    None where what is left cannot be paired.  Steger and Wormald, Generating random regular graphs
    quickly, 1999.  From the same numbers it makes the same graphs as networkx, without its sets.
    """
    shuffle = nx.utils.create_py_random_state(g).shuffle
    made, ends = np.empty(0, np.int64), np.tile(np.arange(n), degree)
    while len(ends):
        shuffle(memoryview(ends.data))
        pairs = np.sort(ends.reshape(-1, 2))
        keys = pairs @ [n, 1]
        good = np.zeros(len(keys), bool)
        good[np.unique(keys, return_index=True)[1]] = True
        good &= (pairs[:, 0] != pairs[:, 1]) & ~np.isin(keys, made)
        made = np.append(made, keys[good])
        left, first, count = np.unique(pairs[~good], return_index=True, return_counts=True)
        within = np.isin(made // n, left) & np.isin(made % n, left)
        if len(left) and 2 * within.sum() == len(left) * (len(left) - 1):
            return None  # all that have ends left are neighbours
        order = np.argsort(first)
        ends = np.repeat(left[order], count[order])
    return Edges(n, made // n, made % n)


@TOPOLOGIES.register("watts-strogatz")
def watts_strogatz(
    n: Count,
    neighbours: Natural = 4,
    p: Probability = 0.1,
    weights: Weights = "metropolis",
    seed: Seed = 0,
) -> Topology:
    """A small world: a ring of ``neighbours`` neighbours, each edge rewired with probability p."""
    if neighbours > n:
        raise ConfigError(f"{neighbours} neighbours do not fit in a ring of {n} nodes")
    if neighbours % 2:
        raise ConfigError(
            f"watts-strogatz starts from an even number of neighbours, not {neighbours}: as many "
            "on either side"
        )
    return _connected(
        lambda g: nx.watts_strogatz_graph(n, neighbours, p, g), "watts-strogatz", weights, seed
    )


@TOPOLOGIES.register("barbell")
def barbell(n: Count, bridge: Natural = 0, weights: Weights = "metropolis") -> Topology:
    """Two complete graphs of the same size, joined by a path of ``bridge`` nodes."""
    half, odd = divmod(n - bridge, 2)
    if odd or half < 2:
        raise ConfigError(
            f"{n} nodes and a bridge of {bridge} make no barbell: "
            "n - bridge must be even and at least 4"
        )
    return from_networkx(nx.barbell_graph(half, bridge), weights)


@TOPOLOGIES.register("margulis")
def margulis(n: Count, weights: Weights = "metropolis") -> Topology:
    """The Margulis-Gabber-Galil expander on the pairs modulo m; n = m^2."""
    side = math.isqrt(n)
    if side**2 != n:
        raise ConfigError(f"a Margulis graph has m^2 nodes, not {n}; take {side**2}")
    graph = nx.margulis_gabber_galil_graph(side)
    return from_networkx(
        nx.convert_node_labels_to_integers(graph, label_attribute="label"), weights
    )


@TOPOLOGIES.register("paley")
def paley(n: Count, weights: Weights = "metropolis") -> Topology:
    """Neighbours differ by a square modulo n, a prime with n mod 4 = 1."""
    if n % 4 != 1 or n < 5 or any(n % d == 0 for d in range(3, math.isqrt(n) + 1, 2)):
        raise ConfigError(f"a Paley graph has a prime n with n mod 4 = 1, not {n}; take 13 or 29")
    return from_networkx(nx.paley_graph(n).to_undirected(), weights)


@TOPOLOGIES.register("geometric")
def geometric(
    n: Count, radius: Positive = 0.4, weights: Weights = "metropolis", seed: Seed = 0
) -> Topology:
    """Random places in the unit square, edges up to ``radius``; drawn until it is connected."""
    return _connected(
        lambda g: nx.random_geometric_graph(n, radius, seed=g), "geometric", weights, seed
    )


@TOPOLOGIES.register("social")
def social(weights: Weights = "metropolis") -> Topology:
    """18 women and the 14 events they went to (Davis, Gardner and Gardner, 1941); 32 nodes."""
    graph = nx.davis_southern_women_graph()
    return from_networkx(
        nx.convert_node_labels_to_integers(graph, label_attribute="label"), weights
    )


@TOPOLOGIES.register("equistatic")
def equistatic(
    n: Count, shifts: Count | None = None, directed: bool = False, seed: Seed = 0
) -> Topology:
    """A gap that does not depend on n, from about log2 n random shifts of a circle.

    Directed: W = (1/M) sum_u [I/n + (1 - 1/n) S_{a_u}], S_a sending i to i + a, a_u uniform in
    1..n-1; undirected: (W + W^T)/2.  M = floor(8 ln(2n/p) / (3 eps^2)) shifts have SLEM < eps with
    probability 1 - p; the default floor(log2 n) has a SLEM of about 0.76 directed, 0.65 undirected.
    EquiTopo, Song et al., NeurIPS 2022.
    """
    count = shifts or max(1, n.bit_length() - 1)
    a = drawn_shifts(n, count, "equistatic", seed)
    matrix = sparse.eye_array(n) / n
    for shift in a:
        matrix = matrix + (1 - 1 / n) / count * cyclic(n, shift)
    w = sparse.csr_array(matrix if directed else (matrix + matrix.T) / 2)
    return Topology(n, lambda k: w, directed=directed)


def drawn_shifts(n: int, count: int, name: str, seed: int) -> list[int]:
    """``count`` shifts of a circle of n, uniform in 1..n-1; none if n = 1."""

    def draw(g: np.random.Generator) -> list[int] | None:
        a = g.integers(1, n, count).tolist() if n > 1 else []
        # Not in the paper: shifts that share a divisor with n never mix, and are drawn again.
        return a if math.gcd(n, *a) == 1 else None

    return _redraw(draw, name, seed)


def cyclic(n: int, a: int) -> sparse.csr_array:
    """S_a ``[n, n]``: i sends to i + a modulo n."""
    i = np.arange(n)
    return sparse.csr_array((np.ones(n), ((i + a) % n, i)), shape=(n, n))


def _connected(
    draw: Callable[[np.random.Generator], nx.Graph], name: str, weights: Weights, seed: int
) -> Topology:
    """The first connected graph that ``draw`` makes."""

    def attempt(g: np.random.Generator) -> nx.Graph | None:
        graph = draw(g)
        return graph if nx.is_connected(graph) else None

    return from_networkx(_redraw(attempt, name, seed), weights)


def _redraw(attempt: Callable[[np.random.Generator], T | None], name: str, seed: int) -> T:
    for index in range(MAX_DRAWS):
        if (made := attempt(rng(seed, name, index=index))) is not None:
            return made
    raise ConfigError(
        f"{name}: none of {MAX_DRAWS} draws was connected; take more edges or another seed"
    )
