"""What every gossip method promises, on every graph: one table."""

import copy

import numpy as np
import pytest
from canonical import GRAPHS, METHODS, Peers, canonical, pairs, rounds, under_way

from offbeat.algorithms.gossip import cedas, choco, dsgd, motef
from offbeat.runtime.base.errors import ConfigError
from offbeat.topologies import TOPOLOGIES
from offbeat.workers.fleet import Fleet, Outage
from offbeat.workers.tasks import LeastSquares, Quadratic

NOISY = canonical(noise=0.1)
APART = np.random.default_rng(0).standard_normal((8, 20))  # where nodes start, if not at one point
LOSSES = (0.0, 0.3)


def bears(method, graph, loss):
    """Whether a method is right there; else it refuses, which is tested below."""
    topology = TOPOLOGIES.parse(graph, n=8)
    if not method.varying and (topology.period != 1 or topology.directed or loss):
        return False
    return not (loss and topology.directed and not method.pushes)


CASES = [
    (name, graph, loss)
    for name, method in METHODS.items()
    for graph in GRAPHS
    for loss in LOSSES
    if bears(method, graph, loss)
]


def test_the_table_is_large():
    assert len(CASES) > 250


@pytest.mark.parametrize(
    ("name", "graph", "loss", "start"),
    [(*case, APART) for case in CASES]
    + [(*case, None) for case in CASES if case[1] in ("ring", "base")],
)
def test_one_node_and_all_at_once_agree(name, graph, loss, start):
    all_at_once = rounds(NOISY, METHODS[name], graph, Fleet(workers=8, loss=loss), initial=start)
    one_by_one = Peers(NOISY, METHODS[name], graph, loss, start)
    for _ in range(12):
        all_at_once._advance()
        one_by_one.advance()
    both = all_at_once.method.models(all_at_once.node), one_by_one.x
    assert np.abs(both[0] - both[1]).max() < 1e-10
    assert np.abs(both[0] - both[0].mean(axis=0)).max() > 1e-6


def still(method):
    """The method, with steps too small to move anything."""
    made = copy.copy(method)
    made.lr = 0.0
    return made


OUTAGES = [
    Outage(worker=2, from_s=3.5, to_s=9.0),
    Outage(worker=5, from_s=3.5, to_s=30.0),
    Outage(worker=6, from_s=20.0),
]


@pytest.mark.parametrize(("loss", "outages"), [(0.0, []), (0.2, OUTAGES), (0.5, [])])
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("name", METHODS)
def test_mass_is_kept(name, graph, loss, outages):
    """Nodes start at different constants and only mix: the mean stays, or the method refuses."""
    method = still(METHODS[name])
    fleet = Fleet(workers=8, loss=loss, outages=outages, on_outage="lose")
    start = np.arange(8.0)[:, None] + np.zeros(20)
    flat = Quadratic(np.zeros((8, 20)))
    directed = TOPOLOGIES.parse(graph, n=8).directed
    trouble = loss or outages
    if (not method.varying and not bears(method, graph, trouble)) or (
        trouble and directed and not method.pushes
    ):
        with pytest.raises(ConfigError, match=r"right only while|lose the nodes' mean|symmetric"):
            rounds(flat, method, graph, fleet, initial=start)
        return
    made = rounds(flat, method, graph, fleet, initial=start)
    for _ in range(40):
        made._advance()
        if not method.pushes:
            mass = made.node.x
            if name == "noloco":  # what momentum will still move counts, too
                mass = mass + method.momentum / (1 - method.momentum) * made.node.m
            np.testing.assert_allclose(mass.mean(axis=0), 3.5, atol=1e-11)
    if method.pushes:  # what is under way counts, too
        on_the_way = [(w.given - w.taken).sum(axis=0) if w.given is not None else 0
                      for w in made.node._wires.values()]  # fmt: skip
        x, w = made.node.x.sum(axis=0), made.node.w.sum(axis=0)
        np.testing.assert_allclose(x + on_the_way[0], 28.0, atol=1e-10)
        np.testing.assert_allclose(w + on_the_way[1], 8.0, atol=1e-11)
        if not outages:
            for _ in range(2000 if graph == "random-edge" else 200):
                made._advance()
            np.testing.assert_allclose(method.models(made.node), 3.5, atol=1e-3)
    assert (made.messages_lost > 0) == (loss > 0)


@pytest.mark.parametrize("loss", [0.0, 0.3])
@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.asynchronous])
def test_mass_is_kept_by_nodes_at_their_own_pace(name, loss):
    """Over all nodes, what each has and what it has got sums up to the same, event by event."""
    method = still(METHODS[name])
    start = np.arange(8.0)[:, None] + np.zeros(20)
    fleet = Fleet.parse(f"8 lognormal(0.7) stragglers=2x5 loss={loss}")
    made = pairs(Quadratic(np.zeros((8, 20))), method, "ring", fleet, initial=start)
    made._start()
    first = next(iter(method.channels))
    gain = 1.0 if method.pushes else method.channels[first].gain
    for _ in range(1500):
        made._advance()
        got = sum(node.node._got.get(first, 0.0) for node in made.nodes) + under_way(made, first)
        mean = (sum(node.node.x for node in made.nodes) + gain * got) / 8
        np.testing.assert_allclose(mean, 3.5, atol=1e-10)
    assert made.gradients_done > 100


@pytest.mark.parametrize("damping", [1.0, 0.5])
def test_every_copy_of_a_public_vector_is_the_owners(damping):
    """Bit for bit, kept by messages alone."""
    method = cedas(lr=0.03, damping=damping, compressor="qsgd(4)")
    for made in (method, METHODS["choco"], METHODS["motef"]):
        run = Peers(NOISY, made, "random-regular", initial=APART)
        for _ in range(100):
            run.advance()
            for name in made.channels:
                ends = [node._ends[name] for node in run.nodes]
                copies = [(j, h) for end in ends for j, h in end.copies.items()]
                assert len(copies) in (0, 8 * 3)
                for j, h in copies:
                    assert np.array_equal(h, ends[j].h)


def test_both_ends_of_a_link_know_the_same():
    run = Peers(NOISY, METHODS["motef"], "matching", loss=0.3)
    for _ in range(60):
        run.advance()
    for name in ("x", "v"):
        ends = [node._ends[name] for node in run.nodes]
        links = [(i, j) for i, end in enumerate(ends) for j in end.back]
        assert len(links) > 40
        for i, j in links:
            assert np.array_equal(ends[i].back[j], ends[j].out[i])


@pytest.mark.parametrize("name", METHODS)
def test_single_precision_stays_single(name):
    task = LeastSquares(NOISY.a.astype(np.float32), NOISY.b.astype(np.float32))
    task.initial = lambda seed: np.zeros(20, np.float32)
    made = rounds(task, METHODS[name], "ring")
    for _ in range(5):
        made._advance()
    assert {v.dtype.name for v in made.node.fields().values()} == {"float32"}
    if METHODS[name].asynchronous:
        apace = pairs(task, METHODS[name], "ring", steps=5, every=5)
        apace.run()
        assert {v.dtype.name for node in apace.nodes for v in node.node.fields().values()} == {
            "float32"
        }


def test_bytes_are_those_of_the_messages():
    """Dense: header and numbers, a message for every neighbour, channel and round."""
    made = rounds(NOISY, dsgd(lr=0.01), "star")
    for _ in range(10):
        made._advance()
    # The first round's messages are known to all: the nodes start at one point.
    assert made.bytes == 9 * 14 * (8 + 20 * 8)
    assert made.messages == 10 * 14
    one = choco(compressor="topk(4)").compressor.compress(np.arange(1.0, 21.0), None)
    made = rounds(NOISY, choco(compressor="topk(4)"), "ring")
    for _ in range(10):
        made._advance()
    assert 0.8 < made.bytes / (9 * 16 * one.nbytes) < 1.2


def test_replicas_for_all_cost_what_they_must():
    """ "global": every message goes to all who are ever neighbours, in every round."""
    method = motef(compressor="topk(4)")
    # Neighbours ever, and in a round on average: three of one, and all seven of a quarter.
    for graph, more in (("one-peer-exponential", 3), ("random-edge", 7 / 0.25)):
        sent = {}
        for replicas in ("links", "global"):
            made = rounds(NOISY, method, graph, replicas=replicas)
            for _ in range(50):
                made._advance()
            sent[replicas] = made.bytes
        assert sent["global"] / sent["links"] == pytest.approx(more, rel=0.1)
