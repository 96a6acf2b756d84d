"""Graphs that change from round to round: cyclic sequences, and random ones."""

import math
from collections.abc import Sequence
from operator import itemgetter
from typing import Annotated

import networkx as nx
import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import sparse
from scipy.spatial import cKDTree

from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.base.randomness import rng
from offbeat.runtime.base.registry import Count, File, Holds, Positive, Seed
from offbeat.runtime.base.tables import read_table, whole, wholes
from offbeat.topologies.contract import TOPOLOGIES, Topology
from offbeat.topologies.files import COLUMNS, ends
from offbeat.topologies.graphs import Probability, cyclic, drawn_shifts, levels
from offbeat.topologies.weights import Edges, check_connected, metropolis_pairs, pairwise

Nodes = Sequence[int]
Part = Annotated[str | Topology, Holds(TOPOLOGIES)]
Pairs = list[tuple[int, int, float]]  # (i, j, w_ij = w_ji) of one round

MOST_ROUNDS = 100_000  # that a file of timed edges has


@TOPOLOGIES.register("one-peer-exponential")
def one_peer_exponential(n: Count) -> Topology:
    """Round t: i sends to i + 2^t; exact after log2 n rounds if n is a power of two.

    W = (I + S_{2^(t mod ceil(log2 n))})/2.  Ying et al., NeurIPS 2021.
    """
    half = sparse.eye_array(n) / 2
    return Topology(
        n, lambda t: half + cyclic(n, 2**t) / 2, period=max(1, levels(n)), directed=n > 2
    )


@TOPOLOGIES.register("hyper-hypercube")
def hyper_hypercube(n: Count, peers: Count = 1) -> Topology:
    """Groups of f_1, then f_2, ... average; n = f_1 f_2 ..., f <= peers + 1 (Takezawa et al.)."""
    factors = _factors(n, peers + 1)
    if factors is None:
        raise ConfigError(
            f"{n} is no product of numbers up to {peers + 1}: take more peers, or base({n})"
        )
    return _exact(n, _hyper(range(n), factors))


@TOPOLOGIES.register("simple-base")
def simple_base(n: Count, peers: Count = 1) -> Topology:
    """Exact consensus of any n, at most ``peers`` neighbours a round: the Simple Base Graph."""
    return _exact(n, _simple(range(n), peers + 1))


@TOPOLOGIES.register("base")
def base(n: Count, peers: Count = 1) -> Topology:
    """Exact consensus of any n, at most ``peers`` neighbours a round: the Base-(k+1) Graph.

    At most 2 log_{k+1}(n) + 2 rounds, k = ``peers``.  Takezawa et al., Beyond Exponential Graph,
    NeurIPS 2023.
    """
    most = peers + 1
    simple = _simple(range(n), most)
    factors, q = _split(n, most)
    within = [_simple(range(at, at + q), most) for at in range(0, n, q)]
    across = [_hyper(range(at, n, q), factors) for at in range(q)]
    rounds = _together(within) + _together(across)
    return _exact(n, rounds if len(rounds) < len(simple) else simple)


def _exact(n: int, rounds: list[Pairs]) -> Topology:
    """The cyclic sequence of ``rounds``, each symmetric; a single node has one idle round."""

    def matrix(k: int) -> sparse.csr_array:
        i, j, w = np.array(rounds[k] if rounds else []).reshape(-1, 3).T
        return pairwise(n, i.astype(int), j.astype(int), w)

    return Topology(n, matrix, period=max(1, len(rounds)))


def _split(n: int, most: int) -> tuple[list[int], int]:
    """n = f_1 f_2 ... q with f <= ``most``, ascending, taken greedily from the largest down."""
    factors = []
    for f in range(most, 1, -1):
        while n % f == 0:
            factors.append(f)
            n //= f
    return factors[::-1], n


def _factors(n: int, most: int) -> list[int] | None:
    factors, rest = _split(n, most)
    return factors if rest == 1 else None


def _hyper(nodes: Nodes, factors: list[int]) -> list[Pairs]:
    """Hyper-hypercube: round l averages groups of f_l nodes that lie f_1 ... f_{l-1} apart."""
    rounds, stride = [], 1
    for f in factors:
        block = stride * f
        rounds.append(
            [
                (group[a], group[b], 1 / f)
                for at in range(0, len(nodes), block)
                for first in range(at, at + stride)
                for group in [nodes[first : at + block : stride]]
                for b in range(f)
                for a in range(b)
            ]
        )
        stride = block
    return rounds


def _simple(nodes: Nodes, most: int) -> list[Pairs]:
    """The Simple Base Graph of ``nodes``; the paper's k + 1 is ``most``."""
    n = len(nodes)
    factors, rest = _split(n, most)
    if rest == 1:
        return _hyper(nodes, factors)
    # n = sum_l a_l (k+1)^p_l: V_l consecutive, cut into a_l parts of (k+1)^p_l nodes.
    parts: list[list[Nodes]] = []
    power, at = most ** int(math.log(n, most) + 1), 0
    while at < n:
        digit = (n - at) // power
        if digit:
            parts.append([nodes[at + a * power : at + (a + 1) * power] for a in range(digit)])
        at, power = at + digit * power, power // most
    groups = [_nodes(cut) for cut in parts]

    # Phase 1: every V_l comes to its own mean.
    own = [_hyper(group, _factors(len(group), most) or []) for group in groups]
    rounds = [
        [edge for mine in own if mine for edge in mine[r % len(mine)]] for r in range(len(own[0]))
    ]

    # Phase 2, round r: all later nodes meet V_r, which then agrees within its parts again.
    inner = [
        _together([_hyper(part, _factors(len(part), most) or []) for part in cut])
        if len(cut[0]) > 1
        else mine
        for cut, mine in zip(parts, own, strict=True)
    ]
    last = len(parts) - 1
    for r in range(len(inner[0]) + 1):
        edges: Pairs = []
        if r < last:
            left = sum(map(len, groups[r:]))
            weight = len(groups[r]) / (len(parts[r]) * left)
            later = _nodes(groups[r + 1 :])
            # The t-th later node meets the t-th node of every part: each is used once.
            edges += [(i, part[t], weight) for t, i in enumerate(later) for part in parts[r]]
        for at, mine in enumerate(inner):
            begun = r - min(at + 1, last)
            if 0 <= begun < len(mine):
                edges += mine[begun]
        rounds.append(edges)
    return rounds


def _nodes(parts: Sequence[Nodes]) -> list[int]:
    """All nodes of several groups, in order."""
    return [node for part in parts for node in part]


def _together(sequences: list[list[Pairs]]) -> list[Pairs]:
    """Sequences of equal length on disjoint nodes, run side by side."""
    return [[edge for edges in step for edge in edges] for step in zip(*sequences, strict=True)]


@TOPOLOGIES.register("equidyn")
def equidyn(
    n: Count,
    eta: Annotated[float, Field(gt=0, le=1)] = 0.5,
    shifts: Count | None = None,
    directed: bool = False,
    seed: Seed = 0,
) -> Topology:
    """One peer a round, at a random distance; a gap that does not depend on n.

    Each round draws a from 1..n-1, or from a list of ``shifts`` of them drawn once.  Directed:
    W = (1-eta) I + eta [I/n + (1 - 1/n) S_a]; undirected: a matching of i with i + a, made
    greedily from a random node on, in the place of S_a.  eta = 1 mixes badly.  EquiTopo, Song et
    al., NeurIPS 2022.
    """
    if n == 1:
        return _exact(1, [])
    known = drawn_shifts(n, shifts, "equidyn shifts", seed) if shifts else range(1, n)
    rest = sparse.eye_array(n) * (1 - eta + eta / n)

    def matrix(k: int) -> sparse.csr_array:
        g = rng(seed, "equidyn", index=k)
        a, start = int(g.choice(known)), int(g.integers(n))
        peer = cyclic(n, a) if directed else matched(n, a, start)
        return rest + eta * (1 - 1 / n) * peer

    return Topology(n, matrix, period=None, directed=directed)


def matched(n: int, a: int, start: int) -> sparse.csr_array:
    """Permutation ``[n, n]`` that swaps i and i + a, greedily from ``start`` on; else 1."""
    peer = np.arange(n)
    for i in range(start, start + n):
        i, j = i % n, (i + a) % n
        if peer[i] == i and peer[j] == j:
            peer[i], peer[j] = j, i
    return sparse.csr_array((np.ones(n), (np.arange(n), peer)), shape=(n, n))


@TOPOLOGIES.register("matching")
def matching(n: Count, seed: Seed = 0) -> Topology:
    """Random pairs average, everyone in one pair (of odd n, one node rests)."""

    def matrix(k: int) -> sparse.csr_array:
        order = rng(seed, "matching", index=k).permutation(n)[: n - n % 2]
        return pairwise(n, order[::2], order[1::2], 0.5)

    return Topology(n, matrix, period=None)


@TOPOLOGIES.register("random-edge")
def random_edge(n: Count, seed: Seed = 0) -> Topology:
    """Two random nodes average, all others rest (randomised gossip, Boyd et al., 2006)."""

    def matrix(k: int) -> sparse.csr_array:
        pair = rng(seed, "random-edge", index=k).choice(n, size=(2, min(1, n - 1)), replace=False)
        return pairwise(n, pair[0], pair[1], 0.5)

    return Topology(n, matrix, period=None)


@TOPOLOGIES.register("dropout")
def dropout(of: Part, p: Probability = 0.1, recompute: bool = False, seed: Seed = 0) -> Topology:
    """Every edge of another topology fails with probability p, each round anew.

    A failed edge's weight goes back to the diagonal of both its ends, or Metropolis-Hastings
    weights are computed for the edges that are left.
    """
    whole = _undirected(of, seed, "dropout")

    def matrix(k: int) -> sparse.csr_array:
        edges = sparse.triu(whole.matrix(k), k=1, format="coo")
        kept = rng(seed, "dropout", index=k).random(edges.nnz) >= p
        i, j = edges.row[kept], edges.col[kept]
        if recompute:
            return metropolis_pairs(whole.n, i, j)
        return pairwise(whole.n, i, j, edges.data[kept])

    return Topology(whole.n, matrix, period=None, names=whole.names)


@TOPOLOGIES.register("mobile")
def mobile(n: Count, radius: Positive = 0.4, leg: Count = 20, seed: Seed = 0) -> Topology:
    """Nodes walk between random places of the unit square and hear who is within ``radius``.

    Random waypoint: each node goes straight to its next place, in ``leg`` rounds.  Legs of equal
    length in time, not of equal speed, so that round k needs no walk through the rounds before.
    Metropolis-Hastings weights; who is alone keeps its vector.
    """

    def places(k: int) -> NDArray:
        clock = k + rng(seed, "mobile start").integers(leg, size=n)  # not all turn at once
        number, done = np.divmod(clock, leg)
        first = k // leg
        way = np.array(
            [rng(seed, "mobile", index=first + ahead).random((n, 2)) for ahead in (0, 1, 2)]
        )
        at, node = number - first, np.arange(n)
        return way[at, node] + (way[at + 1, node] - way[at, node]) * (done / leg)[:, None]

    def near(k: int) -> NDArray:
        return cKDTree(places(k)).query_pairs(radius, output_type="ndarray").reshape(-1, 2)

    def graph(k: int) -> nx.Graph:
        drawn = nx.Graph()
        drawn.add_nodes_from((i, {"pos": tuple(at)}) for i, at in enumerate(places(k).tolist()))
        drawn.add_edges_from(near(k).tolist())
        return drawn

    return Topology(n, lambda k: metropolis_pairs(n, *near(k).T), graph=graph, period=None)


@TOPOLOGIES.register("b-connected")
def b_connected(of: Part, parts: Count = 2, seed: Seed = 0) -> Topology:
    """The edges of a fixed graph in random ``parts``, one a round: any B rounds are connected.

    Metropolis-Hastings weights of the round's edges.
    """
    whole = _undirected(of, seed, "b-connected")
    if whole.period != 1:
        raise ConfigError("b-connected takes the edges of a fixed graph, not of a sequence")
    i, j = sparse.triu(whole.matrix(), k=1).nonzero()
    cut = np.array_split(rng(seed, "b-connected").permutation(len(i)), parts)
    return Topology(
        whole.n,
        lambda k: metropolis_pairs(whole.n, i[cut[k]], j[cut[k]]),
        period=parts,
        names=whole.names,
    )


@TOPOLOGIES.register("cycle")
def cycle(of: list[Part], seed: Seed = 0) -> Topology:
    """Several topologies in turn; each goes on, on its next turn, with its own next round."""
    turns = [_made(one, seed) for one in of]
    if len(sizes := {one.n for one in turns}) != 1:
        raise ConfigError(f"a cycle needs topologies of one size, not of {sorted(sizes) or 'none'}")
    if len(called := {one.names for one in turns} - {None}) > 1:
        raise ConfigError("a cycle needs the same nodes, in the same order, in all its topologies")
    periods = [one.period for one in turns]
    period = None if None in periods else len(turns) * math.lcm(*(p or 1 for p in periods))

    def turn(k: int) -> tuple[Topology, int]:
        return turns[k % len(turns)], k // len(turns)

    def matrix(k: int) -> sparse.csr_array:
        one, own = turn(k)
        return one.matrix(own)

    def graph(k: int) -> nx.Graph:
        one, own = turn(k)
        return one.graph(own)

    directed = any(one.directed for one in turns)
    return Topology(
        turns[0].n,
        matrix,
        graph=graph,
        period=period,
        directed=directed,
        names=next(iter(called), None),
    )


TIMED = "a line is round,i,j, or what a header says: time, source, target in any order"


@TOPOLOGIES.register("timed")
def timed(file: File, n: Count | None = None, allow_disconnected: bool = False) -> Topology:
    """Undirected edges from a file of lines "round,i,j"; after its last round it starts again.

    Metropolis-Hastings weights of the round's edges.  A header may name the columns, in any order:
    time, source, target.  Nodes are those in the file, or with ``n`` the numbers 0..n-1.
    """
    edges, names = _timed_edges(file, n)
    size = n or len(names)
    called = None if n or names == [str(i) for i in range(size)] else names
    if not allow_disconnected:
        check_connected(Edges(size, *edges[:, 1:].T, names=called))

    def matrix(k: int) -> sparse.csr_array:
        return metropolis_pairs(size, *edges[edges[:, 0] == k, 1:].T)

    return Topology(size, matrix, period=int(edges[-1, 0]) + 1, names=called)


def _timed_edges(file: str, n: int | None) -> tuple[NDArray, list[str]]:
    """(round, i, j) of each edge, ``[m, 3]``, and the names of the file's nodes."""
    table = read_table(file)
    words, below = table.titles(COLUMNS)
    if not below.rows:
        raise ConfigError(f"{file}: has no edges; {TIMED}")
    table = table.named(COLUMNS, TIMED, ("time", "source", "target"))
    if {*table.header} - {""} != {"time", "source", "target"}:
        raise ConfigError(f"{file}: has the columns {', '.join(table.header)}; {TIMED}")
    names, src, dst = ends(table)
    numbers = wholes(names) or [-1] * len(names)
    rows = []
    for at, (word, *edge) in enumerate(zip(table.column("time"), src, dst, strict=True)):
        t, (i, j) = whole(word), edge if n is None else [numbers[node] for node in edge]
        if t is None or t < 0 or i == j or (n is not None and not 0 <= min(i, j) <= max(i, j) < n):
            among = "" if n is None else f" among nodes 0..{n - 1}"
            raise ConfigError(f"{table.at(at)} is no round,i,j{among}")
        if t >= MOST_ROUNDS:
            raise ConfigError(
                f"{table.at(at)}: round {t} is beyond {MOST_ROUNDS:,}; number rounds from 0"
            )
        rows.append((t, min(i, j), max(i, j)))
    last = wholes(table.column("target"))
    if not words and last == sorted(last or ()) and rows != sorted(rows, key=itemgetter(0)):
        raise ConfigError(
            f"{table.at(0)}: its last column may be the time; name the columns in a header, as "
            "source,target,time"
        )
    return np.array(sorted(set(rows))), names


def _made(of: str | Topology, seed: int) -> Topology:
    """A topology, from its text if need be; ``seed`` where the text has none."""
    return TOPOLOGIES.parse(of, seed=seed) if isinstance(of, str) else of


def _undirected(of: str | Topology, seed: int, name: str) -> Topology:
    whole = _made(of, seed)
    if whole.directed:
        raise ConfigError(
            f"{name} needs an undirected topology: without an edge back, columns would not sum to 1"
        )
    return whole
