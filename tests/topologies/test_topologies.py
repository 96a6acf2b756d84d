"""One table of all topologies: what each must be, whatever it is; then the numbers of each."""

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from offbeat import ConfigError
from offbeat.runtime.base.randomness import rng
from offbeat.topologies import (
    TOPOLOGIES,
    WEIGHTS,
    check,
    consensus_length,
    effective_gap,
    facts,
    from_matrix,
    from_networkx,
    saved,
    slem,
    spectral_gap,
    weigh,
)
from offbeat.topologies.graphs import _paired
from offbeat.topologies.sequences import matched

parse = TOPOLOGIES.parse


def always(n):
    return True


def prime(n):
    return n > 1 and all(n % d for d in range(2, n))


# Text for n nodes, the sizes it must build, and whether its seed matters; every registered
# topology has a row.
TABLE = {
    "ring": ("ring:{n}", always, False),
    "path": ("path:{n}", always, False),
    "star": ("star:{n}", always, False),
    "complete": ("complete:{n}", always, False),
    "grid": ("grid({n}, 3)", always, False),
    "torus": ("torus(2, {n})", always, False),
    "hypercube": ("hypercube:{n}", lambda n: n & (n - 1) == 0, False),
    "exponential": ("exponential:{n}", always, False),
    "undirected-exponential": ("undirected-exponential:{n}", always, False),
    "erdos-renyi": ("erdos-renyi({n}, p=0.5)", always, True),
    "random-regular": ("random-regular({n}, 4)", lambda n: n > 4, True),
    "watts-strogatz": ("watts-strogatz({n}, 4, p=0.3)", lambda n: n >= 4, True),
    "barbell": ("barbell({n}, bridge=1)", lambda n: n >= 5 and n % 2 == 1, False),
    "margulis": ("margulis:{n}", lambda n: round(n**0.5) ** 2 == n, False),
    "paley": ("paley:{n}", lambda n: prime(n) and n % 4 == 1, False),
    "geometric": ("geometric({n}, 0.7)", always, True),
    "social": ("social", always, False),
    "equistatic": ("equistatic:{n}", always, True),
    "saved": ("saved('ring-{n}.json')", lambda n: n > 1, False),
    "file": ("file('ring-{n}.txt')", lambda n: n > 1, False),
    "one-peer-exponential": ("one-peer-exponential:{n}", always, False),
    "hyper-hypercube": (
        "hyper-hypercube({n}, peers=4)",
        lambda n: all(p <= 5 for p in range(2, n + 1) if prime(p) and n % p == 0),
        False,
    ),
    "simple-base": ("simple-base:{n}", always, False),
    "base": ("base({n}, peers=2)", always, False),
    "equidyn": ("equidyn:{n}", always, True),
    "matching": ("matching:{n}", always, True),
    "random-edge": ("random-edge:{n}", always, True),
    "dropout": ("dropout(ring({n}), 0.3)", always, True),
    "mobile": ("mobile:{n}", always, True),
    "b-connected": ("b-connected(star({n}), 3)", always, True),
    "cycle": ("cycle([ring({n}), base({n})])", always, False),
    "timed": ("timed('timed-{n}.csv')", lambda n: n > 1, False),
}
EVERY = pytest.mark.parametrize("name", TABLE)
SEEDED = pytest.mark.parametrize("name", [name for name in TABLE if TABLE[name][2]])


@pytest.fixture(scope="module", autouse=True)
def files(tmp_path_factory):
    """A folder with a ring of each size as an edge list, and edge by edge in time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp("files"))
        for n in range(1, 41):
            ring = [(i, (i + 1) % n) for i in range(n if n > 2 else n - 1)]
            (folder / f"ring-{n}.txt").write_text("".join(f"{i} {j}\n" for i, j in ring))
            if n > 1:
                (folder / f"ring-{n}.json").write_text(saved.text(parse(f"ring:{n}")))
            timed = "".join(f"{at},{i},{j}\n" for at, (i, j) in enumerate(ring))
            (folder / f"timed-{n}.csv").write_text(timed)
        yield folder


def make(name, n, **extra):
    return parse(TABLE[name][0].format(n=n), **extra)


def dense(topology, k=0):
    return topology.matrix(k).toarray()


def test_the_table_is_complete():
    assert set(TABLE) == set(TOPOLOGIES)


@EVERY
@settings(max_examples=12, deadline=None)
@given(n=st.integers(1, 40), k=st.integers(0, 200), seed=st.integers(0, 5))
def test_every_matrix_is_doubly_stochastic_and_sits_on_its_graph(name, n, k, seed):
    if not TABLE[name][1](n):
        with pytest.raises(ConfigError, match=f"{n}|no edges|no nodes"):
            make(name, n, seed=seed)
        return
    topology = make(name, n, seed=seed)
    w, graph = topology.matrix(k), topology.graph(k)
    assert w.shape == (topology.n, topology.n)
    assert sorted(graph) == list(range(topology.n))
    assert graph.is_directed() == topology.directed
    assert nx.number_of_selfloops(graph) == 0
    check(w, symmetric=not topology.directed, graph=graph)
    assert w.nnz - np.count_nonzero(w.diagonal()) == graph.number_of_edges() * (
        1 if topology.directed else 2
    )
    if topology.period is not None:
        np.testing.assert_array_equal(dense(topology, k), dense(topology, k + topology.period))


@EVERY
def test_a_text_says_all(name):
    n = {"hypercube": 16, "margulis": 16, "barbell": 17, "paley": 17}.get(name, 12)
    topology = make(name, n, seed=3)
    again = parse(str(topology.spec))
    np.testing.assert_array_equal(dense(topology, 5), dense(again, 5))
    table = TOPOLOGIES.table(topology.spec.table())
    np.testing.assert_array_equal(dense(topology, 5), dense(table, 5))


@SEEDED
def test_rounds_are_addressed_by_seed_and_number(name):
    """Rounds asked for in another order, of another object, are the same; seeds differ."""
    one, other, third = make(name, 24, seed=1), make(name, 24, seed=1), make(name, 24, seed=2)
    rounds = [dense(one, k) for k in range(6)]
    for k in (5, 2, 4, 0, 3, 1):
        np.testing.assert_array_equal(rounds[k], dense(other, k))
    assert any((rounds[k] != dense(third, k)).any() for k in range(6))
    if one.period is None:
        assert any((rounds[k] != rounds[0]).any() for k in range(1, 6))


def test_matrices_are_shared_and_read_only():
    topology = parse("ring:8")
    assert topology.matrix(3) is topology.matrix(0)
    with pytest.raises(ValueError, match="read-only"):
        topology.matrix().data[0] = 1.0


def test_rounding_makes_no_graph_directed():
    w = np.array([[0.7, 0.3 + 1e-15], [0.3, 0.7]])
    assert not from_matrix(w).directed
    assert from_matrix(np.roll(np.eye(3), 1, axis=0)).directed


@pytest.mark.parametrize(("n", "degree"), [(50, 48), (20, 17), (9, 8), (8, 4)])
def test_dense_regular_graphs_are_drawn(n, degree):
    graph = parse(f"random-regular({n}, {degree})").graph()
    assert {d for _, d in graph.degree} == {degree}


def test_equidyn_mixes_whatever_shifts_are_drawn():
    """A shift that shares a divisor with n keeps nodes apart for ever."""
    for seed in range(12):
        union = nx.compose_all(
            parse(f"equidyn(8, shifts=1, seed={seed})").graph(k) for k in range(64)
        )
        assert nx.is_connected(union)


def test_a_given_matrix_stays_its_owners():
    w = np.full((3, 3), 1 / 3)
    mixing = sparse.csr_array(w)
    topology = from_matrix(mixing)
    topology.matrix()
    mixing.data[:] = 7.0
    np.testing.assert_array_equal(dense(topology), w)


def test_convention_x_i_gets_from_j():
    """i sends to i + 1: what node 0 had is at node 1."""
    moved = parse("one-peer-exponential:8").matrix(0) @ np.eye(8)[0]
    np.testing.assert_array_equal(np.flatnonzero(moved), [0, 1])
    graph = parse("one-peer-exponential:8").graph(0)
    assert graph.has_edge(0, 1)
    assert not graph.has_edge(1, 0)
    graph = parse("exponential:16").graph()
    assert sorted(graph.successors(3)) == [4, 5, 7, 11]


GAPS = [
    ("ring:8", 0.19526), ("ring:10", 0.12732), ("ring:16", 0.05075), ("ring:32", 0.01281),
    ("ring:40", 0.00821), ("ring:64", 0.00321), ("ring:100", 0.00132),
    ("ring(10, weights=best-constant)", 0.17434), ("ring(40, weights=best-constant)", 0.01224),
    ("ring(100, weights=best-constant)", 0.00197),
    ("path:16", 0.01281), ("star:16", 0.0625), ("star:40", 0.025),
    ("star(40, weights=best-constant)", 0.04878), ("complete:7", 1.0),
    ("grid(4, 4)", 0.1314), ("grid(8, 5)", 0.0335), ("grid(8, 5, weights=best-constant)", 0.0400),
    ("torus(4, 4)", 0.4), ("torus(5, 5)", 0.2764), ("torus(8, 8)", 0.1172),
    ("hypercube:8", 0.5), ("hypercube:16", 0.4), ("hypercube:32", 0.3333),
    ("hypercube:64", 0.2857),
    ("exponential:8", 0.5), ("exponential:16", 0.4), ("exponential:64", 0.2857),
    ("exponential:100", 0.25), ("exponential:25", 0.489), ("undirected-exponential:16", 0.5),
    ("paley:13", 0.671), ("social", 0.0821),
]  # fmt: skip


@pytest.mark.parametrize(("text", "gap"), GAPS)
def test_gaps(text, gap):
    digits = len(str(gap).split(".")[1])
    assert spectral_gap(parse(text).matrix()) == pytest.approx(gap, abs=0.51 * 10**-digits)


RANDOM_GAPS = [  # networkx's own seed 0
    (lambda: nx.erdos_renyi_graph(40, 0.2, seed=0), 0.1367),
    (lambda: nx.erdos_renyi_graph(40, 0.5, seed=0), 0.4981),
    (lambda: nx.random_regular_graph(3, 16, seed=0), 0.151),
    (lambda: nx.random_regular_graph(4, 32, seed=0), 0.179),
    (lambda: nx.random_regular_graph(4, 64, seed=0), 0.103),
    (lambda: nx.random_regular_graph(6, 64, seed=0), 0.281),
    (lambda: nx.random_geometric_graph(32, 0.4, seed=0), 0.1218),
]


@pytest.mark.parametrize(("draw", "gap"), RANDOM_GAPS)
def test_gaps_of_random_graphs_of_networkx(draw, gap):
    digits = len(str(gap).split(".")[1])
    made = from_networkx(draw())
    assert spectral_gap(made.matrix()) == pytest.approx(gap, abs=0.51 * 10**-digits)


@pytest.mark.parametrize(("n", "degree"), [(7, 0), (2, 1), (12, 3), (50, 6), (400, 7)])
def test_random_regular_graphs_are_those_of_networkx(n, degree):
    for seed in range(4):
        g = rng(seed, "test")
        drawn = next(filter(None, (_paired(n, degree, g) for _ in range(100))))
        theirs = nx.random_regular_graph(degree, n, rng(seed, "test"))
        assert nx.utils.graphs_equal(drawn.graph, theirs)
        assert (drawn.hears.sum(axis=1) == degree).all()


def test_margulis_without_and_with_loops_in_the_degree():
    """Loops are no neighbours; counted twice, as networkx's degree does, the gap is .2566."""
    assert spectral_gap(parse("margulis:64").matrix()) == pytest.approx(0.28168, abs=1e-5)
    graph = nx.Graph(nx.margulis_gabber_galil_graph(8))
    a = nx.to_numpy_array(graph, weight=None)
    np.fill_diagonal(a, 0)
    degree = np.array([d for _, d in graph.degree])
    w = a / (1 + np.maximum.outer(degree, degree))
    w += np.diag(1 - w.sum(axis=1))
    assert spectral_gap(w) == pytest.approx(0.2566, abs=5e-5)


@pytest.mark.parametrize("n", [4, 5, 9, 40, 2500])
def test_closed_forms_of_gaps_dense_and_sparse(n):
    c = np.cos(2 * np.pi / n)
    ring = spectral_gap(parse(f"ring:{n}").matrix())
    assert ring == pytest.approx((2 - 2 * c) / 3, rel=1e-6)
    best = spectral_gap(parse(f"ring({n}, weights=best-constant)").matrix())
    if n % 2 == 0:
        assert best == pytest.approx(2 * (1 - c) / (3 - c), rel=1e-6)
    path = spectral_gap(parse(f"path:{n}").matrix())
    assert path == pytest.approx((2 - 2 * np.cos(np.pi / n)) / 3, rel=1e-6)
    assert spectral_gap(parse(f"star:{n}").matrix()) == pytest.approx(1 / n)
    assert spectral_gap(parse(f"star({n}, weights=best-constant)").matrix()) == pytest.approx(
        2 / (n + 1), rel=1e-6
    )


def test_sparse_spectra_agree_with_dense_ones(monkeypatch):
    texts = ["grid(12, 15)", "exponential:150", "erdos-renyi(150, p=0.1)", "base:150",
             "one-peer-exponential:100", "equidyn:100", "complete:30"]  # fmt: skip
    made = [parse(text) for text in texts]
    exact = [effective_gap(one, one.period or 5) for one in made]
    lengths = [consensus_length(one) for one in made]
    monkeypatch.setattr("offbeat.topologies.spectral.DENSE", 10)
    np.testing.assert_allclose([effective_gap(t, t.period or 5) for t in made], exact, rtol=1e-6)
    assert [consensus_length(one) for one in made] == lengths


BASE_LENGTHS = {
    1: dict(zip(range(2, 26), [1, 3, 2, 5, 4, 5, 3, 7, 6, 7, 5, 7, 6, 7, 4, 9, 8, 9, 7, 9, 8, 9,
                               6, 9], strict=True)) | {32: 5, 33: 11, 48: 7, 64: 6, 100: 11},
    2: {5: 3, 7: 4, 10: 4, 11: 5, 16: 4, 25: 6, 100: 8},
    4: {5: 1, 10: 2, 25: 2, 33: 5, 100: 3},
}  # fmt: skip


@pytest.mark.parametrize("peers", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["simple-base", "base"])
def test_base_graphs_reach_the_mean_exactly_with_few_peers(name, peers):
    for n in range(1, 60):
        topology = parse(f"{name}({n}, peers={peers})")
        product = np.eye(n)
        for k in range(topology.period):
            w = topology.matrix(k)
            assert np.diff(w.indptr).max() <= peers + 1
            product = w @ product
        np.testing.assert_allclose(product, 1 / n, rtol=0, atol=1e-12)
        assert consensus_length(topology) == topology.period
        assert topology.period <= 2 * np.log(n) / np.log(peers + 1) + 2


def test_lengths_of_base_graphs():
    for peers, lengths in BASE_LENGTHS.items():
        for n, length in lengths.items():
            assert parse(f"base({n}, peers={peers})").period == length
    simple = [parse(f"simple-base:{n}").period for n in range(2, 26)]
    assert simple == [1, 3, 2, 5, 5, 5, 3, *[7] * 7, 4, *[9] * 9]
    assert parse("hyper-hypercube(20, peers=4)").period == 2  # 5 x 4, not 5 x 2 x 2


def test_one_peer_exponential_is_exact_where_n_is_a_power_of_two():
    exact = [n for n in range(1, 65) if consensus_length(parse(f"one-peer-exponential:{n}"))]
    assert exact == [1, 2, 4, 8, 16, 32, 64]
    for n, left in ((6, 0.2165), (25, 0.192)):
        topology = parse(f"one-peer-exponential:{n}")
        norm = (1 - effective_gap(topology, topology.period)) ** topology.period
        assert norm == pytest.approx(left, abs=5e-4)


def mean_square(matrices):
    """lambda_2 of the mean of W^T W."""
    return slem(sum((w.T @ w).toarray() for w in matrices) / len(matrices))


def pairings(nodes):
    """All perfect matchings."""
    if not nodes:
        yield []
        return
    first, *rest = nodes
    for peer in rest:
        for others in pairings([i for i in rest if i != peer]):
            yield [(first, peer), *others]


@pytest.mark.parametrize("n", [4, 6, 8])
def test_contraction_of_matchings_and_of_single_edges(n):
    def averaging(pairs):
        w = np.eye(n)
        for i, j in pairs:
            w[i, i] = w[j, j] = w[i, j] = w[j, i] = 0.5
        return sparse.csr_array(w)

    every = [averaging(pairs) for pairs in pairings(list(range(n)))]
    assert mean_square(every) == pytest.approx(0.5 - 0.5 / (n - 1))
    drawn = parse(f"matching:{n}")
    assert mean_square([drawn.matrix(k) for k in range(1500)]) == pytest.approx(
        0.5 - 0.5 / (n - 1), abs=0.05
    )
    edges = [averaging([(i, j)]) for i in range(n) for j in range(i)]
    assert mean_square(edges) == pytest.approx(1 - 1 / (n - 1))
    drawn = parse(f"random-edge:{n}")
    assert mean_square([drawn.matrix(k) for k in range(1500)]) == pytest.approx(
        1 - 1 / (n - 1), abs=0.05
    )


def test_draws_are_even():
    """Every pair is as likely as every other."""
    for text, pairs in (("matching:6", 3), ("random-edge:6", 1)):
        topology = parse(text)
        met = sum((topology.matrix(k) > 0).toarray() for k in range(3000)) / 3000
        off = met[~np.eye(6, dtype=bool)]
        np.testing.assert_allclose(off, pairs / 15, atol=0.03)


def test_equidyn_contracts_alike_whatever_the_size():
    """lambda_2 of E W^T W over all draws; eta = 1 is the bad choice."""

    def contraction(n, eta, directed):
        topology = parse(f"equidyn({n}, eta={eta}, directed={directed})")
        return mean_square([topology.matrix(k) for k in range(1500)])

    for n, undirected, directed in ((16, 0.547, 0.477), (32, 0.570, 0.496)):
        assert contraction(n, 0.5, False) == pytest.approx(undirected, abs=0.03)
        assert contraction(n, 0.5, True) == pytest.approx(directed, abs=0.03)
        assert contraction(n, 1.0, False) > 0.85
    n, eta = 16, 0.5  # directed, in closed form: every shift is as likely
    b, c = 1 - eta + eta / n, eta * (1 - 1 / n)
    shifts = [b * np.eye(n) + c * np.roll(np.eye(n), a, axis=0) for a in range(1, n)]
    exact = mean_square([sparse.csr_array(w) for w in shifts])
    assert exact == pytest.approx(b**2 + c**2 - 2 * b * c / (n - 1))


def test_equidyn_pairs_nodes_at_the_shift():
    for n, a, start in ((8, 3, 5), (9, 2, 0), (6, 3, 4)):
        swap = matched(n, a, start).toarray()
        np.testing.assert_array_equal(swap @ swap, np.eye(n))
        peer = swap.argmax(axis=1)
        assert all((peer[i] - i) % n in (0, a, n - a) for i in range(n))
        assert swap[(start + a) % n, start] == 1  # the starting node is matched first
        alone = np.flatnonzero(peer == np.arange(n))
        assert not any((i + a) % n in alone for i in alone)  # greedy leaves no pair unmatched


@pytest.mark.parametrize(
    ("n", "shifts", "directed", "undirected"),
    [(32, 5, 0.76, 0.63), (64, 6, 0.76, 0.62), (300, 8, 0.76, 0.67)],
)
def test_equistatic_keeps_its_gap_with_log_n_shifts(n, shifts, directed, undirected):
    for flag, expected in ((True, directed), (False, undirected)):
        texts = [f"equistatic({n}, {shifts}, directed={flag}, seed={s})" for s in range(60)]
        mean = np.mean([slem(parse(text).matrix()) for text in texts])
        assert mean == pytest.approx(expected, abs=0.06)


def test_dropout_keeps_the_weights_of_what_is_left():
    whole = dense(parse("grid(4, 4)"))
    drop = parse("dropout(grid(4, 4), p=0.25)")
    kept = []
    for k in range(200):
        w = dense(drop, k)
        edges = np.triu(w, 1) > 0
        np.testing.assert_array_equal(w[edges], whole[edges])
        kept.append(edges.sum() / 24)
    assert np.mean(kept) == pytest.approx(0.75, abs=0.02)
    again = parse("dropout(grid(4, 4), p=0.25, recompute=true)")
    for k in range(20):
        graph = again.graph(k)
        assert nx.utils.graphs_equal(graph, drop.graph(k))  # the same edges fail
        expected = weigh(graph, allow_disconnected=True).toarray()
        np.testing.assert_allclose(dense(again, k), expected, atol=1e-15)
    np.testing.assert_array_equal(
        dense(parse("dropout(ring(6), p=0.0)"), 3), dense(parse("ring:6"))
    )
    np.testing.assert_array_equal(dense(parse("dropout(ring(6), p=1.0)"), 3), np.eye(6))


def test_mobile_nodes_walk_straight_and_hear_whom_they_are_near():
    topology = parse("mobile(20, radius=0.3, leg=10, seed=4)")
    places = [np.array([topology.graph(k).nodes[i]["pos"] for i in range(20)]) for k in range(60)]
    for k, at in enumerate(places):
        assert ((at >= 0) & (at <= 1)).all()
        apart = np.linalg.norm(at[:, None] - at, axis=2)
        near = (apart <= 0.3) & ~np.eye(20, dtype=bool)
        np.testing.assert_array_equal(nx.to_numpy_array(topology.graph(k)) > 0, near)
    bends = np.abs(np.diff(places, 2, axis=0)).max(axis=2) > 1e-9  # [58, 20]
    assert (bends.sum(axis=0) >= 5).all()  # each turns every ten rounds ...
    assert (bends.sum(axis=0) <= 6).all()
    assert bends.any(axis=1).sum() > 10  # ... and not all at once


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_any_b_rounds_of_b_connected_are_the_whole_graph(parts):
    topology = parse(f"b-connected(torus(3, 4), {parts})")
    whole = parse("torus(3, 4)").graph()
    for first in range(parts):
        rounds = [topology.graph(first + k) for k in range(parts)]
        assert sum(graph.number_of_edges() for graph in rounds) == whole.number_of_edges()
        assert nx.utils.edges_equal(nx.compose_all(rounds).edges, whole.edges)


def test_a_cycle_runs_each_topology_through_its_own_rounds():
    topology = parse("cycle([complete(4), one-peer-exponential(4)])")
    assert topology.period == 4
    one_peer = parse("one-peer-exponential:4")
    for k in range(8):
        expected = np.full((4, 4), 0.25) if k % 2 == 0 else dense(one_peer, k // 2)
        np.testing.assert_allclose(dense(topology, k), expected, atol=1e-15)
    assert parse("cycle([ring(4), matching(4)])").period is None


def test_a_seed_reaches_what_is_inside():
    for text in ("cycle([erdos-renyi(12)])", "dropout(erdos-renyi(12), p=0.0)"):
        inside = dense(parse("erdos-renyi:12", seed=5))
        np.testing.assert_array_equal(dense(parse(text, seed=5)), inside)
        assert (dense(parse(text)) != inside).any()


def test_timed_edges_come_when_the_file_says(files):
    (files / "t.csv").write_text("# round,i,j\n0,0,1\n2,1,2\n2,3,0\n2,0,3\n")
    topology = parse("timed:t.csv")
    assert topology.period == 3
    assert [sorted(topology.graph(k).edges) for k in range(4)] == [
        [(0, 1)], [], [(0, 3), (1, 2)], [(0, 1)]]  # fmt: skip
    np.testing.assert_array_equal(dense(topology, 1), np.eye(4))


def test_weights():
    graph = nx.star_graph(4)
    maximal = weigh(graph, "max-degree").toarray()
    np.testing.assert_allclose(np.diag(maximal), [0.2, *[0.8] * 4])
    np.testing.assert_allclose(maximal[0, 1:], 0.2)
    lazy = weigh(graph, "lazy(max-degree)").toarray()
    np.testing.assert_allclose(lazy, (np.eye(5) + maximal) / 2)
    assert np.linalg.eigvalsh(weigh(nx.complete_bipartite_graph(4, 4), "lazy").toarray()).min() >= 0
    for graph in (nx.path_graph(9), nx.barbell_graph(4, 1), nx.petersen_graph()):
        best = spectral_gap(weigh(graph, "best-constant"))
        laplacian = nx.laplacian_matrix(graph).toarray()
        for weight in np.linspace(0.02, 0.6, 200):
            assert spectral_gap(np.eye(len(graph)) - weight * laplacian) <= best + 1e-9
    regular = nx.random_regular_graph(3, 10, seed=0)
    for name in ("uniform", "max-degree"):
        np.testing.assert_allclose(
            weigh(regular, name).toarray(), weigh(regular, "metropolis").toarray(), atol=1e-15
        )
    given = np.array([[0.7, 0.3], [0.3, 0.7]])
    np.testing.assert_array_equal(weigh(nx.path_graph(2), given).toarray(), given)
    np.testing.assert_array_equal(dense(from_matrix(given)), given)
    assert set(WEIGHTS) == {
        "attribute", "best-constant", "lazy", "max-degree", "metropolis", "uniform"}  # fmt: skip


def test_loops_and_parallel_edges_are_no_neighbours():
    plain = nx.path_graph(3)
    doubled = nx.MultiGraph([(0, 1), (0, 1), (1, 2), (2, 2)])
    for name in ("metropolis", "max-degree", "best-constant", "lazy"):
        np.testing.assert_array_equal(weigh(doubled, name).toarray(), weigh(plain, name).toarray())
    np.testing.assert_array_equal(dense(from_networkx(doubled)), dense(from_networkx(plain)))


@pytest.mark.parametrize("name", [n for n in WEIGHTS if n not in ("uniform", "attribute")])
@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 30), seed=st.integers(0, 1000))
def test_weights_of_random_graphs_sum_to_one_both_ways(name, n, seed):
    graph = nx.gnp_random_graph(n, 0.3, seed=seed)
    w = weigh(graph, name, allow_disconnected=True).toarray()
    np.testing.assert_allclose(w.sum(axis=0), 1, atol=1e-12)
    np.testing.assert_allclose(w, w.T, atol=1e-15)
    assert ((np.abs(w - np.diag(np.diag(w))) > 0) == nx.to_numpy_array(graph).astype(bool)).all()
    assert slem(w) <= 1 + 1e-12
    if name != "best-constant":
        assert w.min() >= 0


def test_facts():
    assert facts(parse("torus(4, 5)")) == {
        "n": 20, "edges": 40, "degree_min": 4, "degree_max": 4, "connected": True,
        "symmetric": True, "doubly_stochastic": True, "gap": pytest.approx(0.276393),
        "rounds_to_1e-6": 43, "period": 1, "exact_after": None,
    }  # fmt: skip
    base = facts(parse("base:6"))
    assert (base["gap"], base["period"], base["exact_after"], base["degree_max"]) == (1.0, 4, 4, 1)
    assert facts(parse("exponential:8"))["symmetric"] is False
    apart = facts(from_networkx(nx.empty_graph(3), allow_disconnected=True))
    assert (apart["connected"], apart["gap"], apart["rounds_to_1e-6"]) == (False, 0.0, None)
    assert facts(parse("complete:5"))["exact_after"] == 1
    assert facts(parse("ring:1"))["rounds_to_1e-6"] == 1


def test_the_rounds_that_facts_promise_are_enough():
    for text in ("ring:12", "erdos-renyi:20", "exponential:12", "star:9"):
        topology = parse(text)
        rounds = facts(topology)["rounds_to_1e-6"]
        left = [(1 - effective_gap(topology, k)) ** k for k in (rounds, rounds - 1)]
        assert left[0] <= 1e-6 * (1 + 1e-9) < left[1]


BAD = [
    ([[0.5, 0.5]], {}, "must be n x n, not \\[1, 2\\]"),
    (np.zeros((0, 0)), {}, "must be n x n, not \\[0, 0\\]"),
    ([[1.2, -0.2], [-0.2, 1.2]], {}, "row 0 has the weight -0.2 for node 1, which is negative"),
    ([[np.nan, 0.5], [0.5, 0.5]], {}, "row 0 has the weight nan for node 0, which is no number"),
    ([[0.5, 0.5], [0.5, 0.4]], {}, "row 1 sums to 0.9;"),
    ([[0.5, 0.5], [0.4, 0.6]], {}, "column 1 sums to 1.1;"),
    ([[0, 1, 0], [0, 0, 1], [1, 0, 0]], {"symmetric": True},
     "row 0 has the weight 1 for node 1, which has 0 for it"),
    ([[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]], {"graph": nx.path_graph(3)},
     "row 0 has the weight 0.5 for node 2, with which it shares no edge"),
    ([[1.0]], {"graph": nx.path_graph(3)}, "\\[1, 1\\] for 3 nodes"),
]  # fmt: skip


@pytest.mark.parametrize(("matrix", "options", "said"), BAD)
def test_a_matrix_that_does_not_mix_is_named_by_its_worst_row(matrix, options, said):
    with pytest.raises(ConfigError, match=said):
        check(matrix, **options)
    with pytest.raises(ConfigError, match=said):
        check(sparse.csr_array(np.array(matrix, float)), **options)


def test_sums_are_held_to_1e_9():
    check([[0.5, 0.5 + 9e-10], [0.5 + 9e-10, 0.5]])
    with pytest.raises(ConfigError, match=r"sums to 1\.00000001;"):
        check([[0.5, 0.5 + 1e-8], [0.5 + 1e-8, 0.5]])


def test_pieces_are_named():
    graph = nx.disjoint_union_all([nx.path_graph(9), nx.path_graph(7), nx.path_graph(1)])
    said = (
        "3 components, of 9, 7, 1 nodes; cut off from the largest: 9, 10, 11, 12, 13, [.]{3}; 16;"
    )
    with pytest.raises(ConfigError, match=said):
        from_networkx(graph)
    assert from_networkx(graph, allow_disconnected=True).n == 17
    with pytest.raises(ConfigError, match="2 components"):
        from_networkx(nx.DiGraph([(0, 1)]), "uniform")  # nothing comes back from 1


MISTAKES = [
    ("rng:16", 'no topology is called "rng"; did you mean "ring"'),
    ("ring:0", '"n" should be greater than or equal to 1'),
    ("ring:x", '"n" should be a valid integer'),
    ("ring", '"n" is missing'),
    ("ring(8, wieghts=lazy)", 'unknown key "wieghts"; did you mean "weights"'),
    ("ring(8, weights=metropols)", 'did you mean "metropolis"'),
    ("ring(8, weights=lazy(lazi))", 'did you mean "lazy"'),
    ("star(8, weights=uniform)", "all degrees are equal, and here they go from 1 to 7"),
    ("exponential(8, weights=metropolis)", "metropolis weights need an undirected graph"),
    ("ring(8, weights=attribute)", "edge 0, 1 has None"),
    ("hypercube:12", "2\\^d nodes, not 12; take 8 or 16"),
    ("margulis:10", "m\\^2 nodes, not 10; take 9"),
    ("paley:15", "prime n with n mod 4 = 1, not 15"),
    ("barbell:3", "make no barbell"),
    ("random-regular(5, 3)", "no graph of 5 nodes has the degree 3"),
    ("watts-strogatz(3, 4)", "4 neighbours do not fit"),
    ("watts-strogatz(8, 3)", "an even number of neighbours, not 3"),
    ("erdos-renyi(50, p=0.001)", "none of 100 draws was connected"),
    ("erdos-renyi(50, p=1.5)", "less than or equal to 1"),
    ("geometric(50, 0.01)", "none of 100 draws was connected"),
    ("equidyn(8, eta=0.0)", "greater than 0"),
    ("hyper-hypercube:6", "6 is no product of numbers up to 2"),
    ("dropout(exponential(8))", "dropout needs an undirected topology"),
    ("b-connected(base(6))", "a fixed graph, not of a sequence"),
    ("cycle([ring(4), ring(5)])", "one size, not of \\[4, 5\\]"),
    ("cycle([])", "one size, not of none"),
    ("file:nowhere.txt", "nowhere.txt: cannot be read"),
    ("file:nowhere.graphml", "nowhere.graphml: cannot be read .*No such file"),
    ("file:empty.txt", "has no nodes"),
    ("file:nowhere.npy", "nowhere.npy: .*No such file"),
    ("file:rows.npy", "rows.npy: mixing matrix: row 0"),
    ("file('rows.npy', weights=lazy)", "rows.npy: is W itself, n x n numbers; leave weights out"),
    ("file('nan.graphml', weights=attribute)", 'edge 0, 1 has nan as its "weight"'),
    ("timed:epoch.csv", 'epoch.csv line 1: "1763800000,0,1": round 1763800000 is beyond'),
    ("timed:nowhere.csv", "cannot be read"),
    ("timed:apart.txt", 'line 1: "0 1" has 2 columns and no header; a line is round,i,j'),
    ("timed('timed-9.csv', n=5)", '"4,4,5" is no round,i,j among nodes 0..4'),
    ("timed:empty.txt", "has no edges"),
]


@pytest.mark.parametrize(("text", "said"), MISTAKES)
def test_mistakes(files, text, said):
    (files / "empty.txt").write_text("# nothing\n")
    np.save(files / "rows.npy", np.full((2, 2), 0.7))
    nx.write_graphml(nx.Graph([(0, 1, {"weight": np.nan})]), files / "nan.graphml")
    (files / "epoch.csv").write_text("1763800000,0,1\n")
    (files / "apart.txt").write_text("0 1\n2 3\n")
    with pytest.raises(ConfigError, match=said) as caught:
        parse(text)
    assert "\n" not in str(caught.value)
