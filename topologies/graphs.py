"""Fixed graphs.  Most come from networkx; whatever networkx can make, ``from_networkx`` takes."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import networkx as nx
import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import sparse

from offbeat.runtime.errors import ConfigError
from offbeat.runtime.randomness import rng
from offbeat.runtime.registry import Count, Natural, Positive, Seed
from offbeat.topologies.contract import TOPOLOGIES, Topology
from offbeat.topologies.weights import Weights, check, weigh

MAX_DRAWS = 100  # of a random graph, until one is connected

T = TypeVar("T")
Probability = Annotated[float, Field(ge=0, le=1)]


def from_networkx(
    graph: nx.Graph, weights: Weights = "metropolis", *, allow_disconnected: bool = False
) -> Topology:
    """A fixed topology from any networkx graph.

    Nodes become 0..n-1 in the graph's order (their names stay as the attribute ``label``), loops
    and parallel edges are dropped.

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
    offbeat.runtime.errors.ConfigError: the graph is in 2 components, of 1, 1 nodes; cut off from \
the largest: 1; add edges, or pass allow_disconnected=True
    """
    if not len(graph):
        raise ConfigError("the graph has no nodes")
    directed = graph.is_directed()
    if not _plain(graph):
        kind = nx.DiGraph if directed else nx.Graph
        graph = kind(nx.convert_node_labels_to_integers(graph, label_attribute="label"))
        graph.remove_edges_from(list(nx.selfloop_edges(graph)))
    matrix = weigh(graph, weights, allow_disconnected=allow_disconnected)
    n, m = len(graph), graph.number_of_edges()
    links = matrix.nnz - np.count_nonzero(matrix.diagonal())
    if _plain(graph) and links == (m if directed else 2 * m):
        return Topology(n, lambda k: matrix, directed=directed)  # which says all, in less memory
    return Topology(n, lambda k: matrix, graph=lambda k: graph, directed=directed)


def _plain(graph: nx.Graph) -> bool:
    """Whether the graph is its edges between 0..n-1, and nothing more."""
    return (
        not graph.is_multigraph()
        and all(node == i and not facts for i, (node, facts) in enumerate(graph.nodes.items()))
        and not any(facts for *_, facts in graph.edges(data=True))
        and not nx.number_of_selfloops(graph)
    )


def from_matrix(matrix: NDArray | sparse.sparray) -> Topology:
    """A fixed topology from a doubly stochastic W ``[n, n]``, symmetric or not.

    Raises:
        ConfigError: W is not doubly stochastic; names the worst row.
    """
    check(matrix)
    w = sparse.csr_array(matrix, copy=True)
    return Topology(w.shape[0], lambda k: w, directed=abs(w - w.T).max() > 0)


@TOPOLOGIES.register("ring")
def ring(n: Count, weights: Weights = "metropolis") -> Topology:
    """A circle."""
    return from_networkx(nx.cycle_graph(n), weights)


@TOPOLOGIES.register("path")
def path(n: Count, weights: Weights = "metropolis") -> Topology:
    """A line."""
    return from_networkx(nx.path_graph(n), weights)


@TOPOLOGIES.register("star")
def star(n: Count, weights: Weights = "metropolis") -> Topology:
    """Node 0 in the middle of all others."""
    graph = nx.star_graph(n - 1)
    nx.set_node_attributes(graph, {0: (0, 0)}, "pos")
    return from_networkx(graph, weights)


@TOPOLOGIES.register("complete")
def complete(n: Count, weights: Weights = "metropolis") -> Topology:
    """Everyone with everyone: W = J."""
    return from_networkx(nx.complete_graph(n), weights)


@TOPOLOGIES.register("grid")
def grid(rows: Count, columns: Count, weights: Weights = "metropolis") -> Topology:
    """A rectangle."""
    graph = nx.grid_2d_graph(rows, columns)
    nx.set_node_attributes(graph, {(r, c): (c, -r) for r, c in graph}, "pos")
    return from_networkx(graph, weights)


@TOPOLOGIES.register("torus")
def torus(rows: Count, columns: Count, weights: Weights = "metropolis") -> Topology:
    """A rectangle whose opposite sides are joined."""
    return from_networkx(nx.grid_2d_graph(rows, columns, periodic=True), weights)


@TOPOLOGIES.register("hypercube")
def hypercube(n: Count, weights: Weights = "metropolis") -> Topology:
    """Numbers that differ in one bit are neighbours; n is a power of two."""
    dimension = n.bit_length() - 1
    if n != 2**dimension:
        raise ConfigError(
            f"a hypercube has 2^d nodes, not {n}; take {2**dimension} or {2 ** (dimension + 1)}"
        )
    # networkx has no cube of dimension 0.
    graph = nx.hypercube_graph(dimension) if dimension else nx.empty_graph(1)
    return from_networkx(graph, weights)


@TOPOLOGIES.register("exponential")
def exponential(n: Count, weights: Weights = "uniform") -> Topology:
    """Directed: i sends to i + 1, i + 2, i + 4, ... (Ying et al., NeurIPS 2021)."""
    graph = nx.empty_graph(n, create_using=nx.DiGraph)
    graph.add_edges_from((i, (i + 2**b) % n) for i in range(n) for b in range(levels(n)))
    return from_networkx(graph, weights)


@TOPOLOGIES.register("undirected-exponential")
def undirected_exponential(n: Count, weights: Weights = "metropolis") -> Topology:
    """Neighbours at the distances 1, 2, 4, ... on a circle."""
    return from_networkx(nx.circulant_graph(n, [2**b for b in range(levels(n))]), weights)


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
    return _connected(
        lambda g: nx.random_regular_graph(degree, n, g), "random-regular", weights, seed
    )


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
    return from_networkx(nx.margulis_gabber_galil_graph(side), weights)


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
    return from_networkx(nx.davis_southern_women_graph(), weights)


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

    def draw(g: np.random.Generator) -> list[int] | None:
        a = g.integers(1, n, count).tolist() if n > 1 else []
        # Not in the paper: shifts that share a divisor with n never mix, and are drawn again.
        return a if math.gcd(n, *a) == 1 else None

    a = _redraw(draw, "equistatic", seed)
    matrix = sparse.eye_array(n) / n
    for shift in a:
        matrix = matrix + (1 - 1 / n) / count * cyclic(n, shift)
    w = sparse.csr_array(matrix if directed else (matrix + matrix.T) / 2)
    return Topology(n, lambda k: w, directed=directed)


def cyclic(n: int, a: int) -> sparse.csr_array:
    """S_a ``[n, n]``: i sends to i + a modulo n."""
    i = np.arange(n)
    return sparse.csr_array((np.ones(n), ((i + a) % n, i)), shape=(n, n))


@TOPOLOGIES.register("file")
def file(path: str, weights: Weights = "metropolis", allow_disconnected: bool = False) -> Topology:
    """A graph from GraphML (.graphml), or from lines "i j" or "i,j,weight" of any node names.

    With ``weights="attribute(weight)"`` the third column is W[i, j] = W[j, i].
    """
    place = Path(path).expanduser()
    if place.suffix == ".graphml":
        try:
            graph = nx.read_graphml(place)
        except (OSError, nx.NetworkXError, SyntaxError, KeyError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read as GraphML ({error})") from None
    else:
        graph = _edge_list(path)
    return from_networkx(graph, weights, allow_disconnected=allow_disconnected)


def _edge_list(path: str) -> nx.Graph:
    edges = []
    for number, fields in table(path):
        try:
            i, j, weight = (*fields, "1") if len(fields) == 2 else fields
            edges.append((i, j, float(weight)))
        except ValueError:
            line = " ".join(fields)[:40]
            raise ConfigError(f'{path} line {number}: "{line}" is no edge i j [weight]') from None
    names = dict.fromkeys(name for i, j, _ in edges for name in (i, j))
    graph = nx.Graph()
    # Numbered nodes keep their order, others come as in the file.
    graph.add_nodes_from(sorted(names, key=int) if all(map(str.isdecimal, names)) else names)
    graph.add_weighted_edges_from(edges)
    return graph


def table(path: str) -> list[tuple[int, list[str]]]:
    """(line number, fields) of each line, cut at commas or spaces; ``#`` begins a remark.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        text = Path(path).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    rows = (line.partition("#")[0].replace(",", " ").split() for line in text.splitlines())
    return [(number, fields) for number, fields in enumerate(rows, start=1) if fields]


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
