"""One live node among others: the stacked run without faults, and what holds with them."""

import copy
import pickle
from collections import Counter

import numpy as np
import pytest
from canonical import GRAPHS, METHODS, canonical, rounds
from simulated import (
    Simulation,
    copies_agree,
    ends_agree,
    experiment,
    moves_are_kept,
    put_in,
    sums_are_kept,
)

from offbeat.algorithms.gossip import ad_psgd, dsgt, motef
from offbeat.runtime.base.errors import PeerError
from offbeat.runtime.node.make import gossip_node
from offbeat.runtime.node.node import MOST_OPENINGS, OPEN, OPENING
from offbeat.runtime.node.synchronous import MOST_EARLY
from offbeat.topologies import TOPOLOGIES
from offbeat.workers.fleet import Fleet

NOISY = canonical(noise=0.1)
SEEDS = 120  # of each kind of run with faults


def suits(method, graph, loss=0.0):
    topology = TOPOLOGIES.parse(graph, n=8)
    if not method.varying and (topology.period != 1 or topology.directed or loss):
        return False
    return not (loss and topology.directed and not method.pushes)


CASES = [
    (name, graph, loss)
    for name, method in METHODS.items()
    for graph in GRAPHS
    for loss in (0.0, 0.3)
    if suits(method, graph, loss) and (not loss or graph in ("ring", "base", "matching"))
]


@pytest.mark.parametrize(("name", "graph", "loss"), CASES)
def test_without_faults_it_is_the_stacked_run(name, graph, loss):
    """Late, reordered, doubled and lost messages that are sent again change nothing."""
    whole = rounds(NOISY, METHODS[name], graph, Fleet(workers=8, loss=loss))
    for _ in range(20):
        whole._advance()
    live = Simulation(experiment(NOISY, METHODS[name], graph, loss), 1, 20, drop=0.2, double=0.2)
    live.run()
    assert live.counts["lost"] > 0
    assert live.counts["doubled"] > 0
    np.testing.assert_allclose(live.x, whole.method.models(whole.node), rtol=0, atol=1e-12)
    counts = sum((node.counts for node in live.nodes.values()), start=Counter())
    for key in ("bytes", "messages", "messages_lost"):
        assert counts[key] == getattr(whole, key)


BEARS = [
    (name, graph)
    for name, method in METHODS.items()
    for graph in ("ring", "random-regular", "matching", "exponential")
    if method.pushes or (method.varying and not TOPOLOGIES.parse(graph, n=8).directed)
]


def check(simulation, i):
    copies_agree(simulation, i)
    sums_are_kept(simulation, i)


def faulty(seed, drop=0.05, **more):
    """A run with faults, to its end."""
    name, graph = BEARS[seed % len(BEARS)]
    live = Simulation(
        experiment(NOISY, METHODS[name], graph), seed, 20, drop=drop, double=0.05, **more
    )
    live.faults(5, 35.0)
    live.run()
    assert live.settled, f"tests/runtime/test_node.py: faulty({seed})"
    assert {node.round for node in live.nodes.values()} == {20}
    if "v" in (channels := METHODS[name].channels):  # of all nodes, whoever died
        nodes = live.nodes.values()  # a link that closed after the last round is still owed
        v = sum(node.node.v + channels["v"].gain * node.node._ends["v"].owed for node in nodes)
        np.testing.assert_allclose(v, sum(map(put_in, nodes)), atol=1e-9)
    return live


def test_with_faults_what_must_hold_holds():
    """A hundred seeds; a seed that fails is named, and does the same again."""
    counts = sum((faulty(seed, check=check).counts for seed in range(SEEDS)), Counter())
    for happened in ("killed", "restarted", "parted", "lost", "doubled"):
        assert counts[happened] > 100
    assert counts["copies compared"] > 5_000
    assert counts["sums compared"] > 3_000


def test_a_seed_of_which_mail_of_a_former_incarnation_was_once_mixed():
    assert faulty(1333, drop=0.2, check=check).settled


def test_mail_of_a_former_incarnation_is_forgotten():
    """It came while the link was opening; the next incarnation does the same round again."""
    node = gossip_node(experiment(NOISY, METHODS["dsgd"]), 0)
    node.start()
    node.down(1)
    node.up(1)
    node.receive(1, "mail", 1, (np.zeros(20),))
    assert 1 in node.mail[1]
    says = np.array([MOST_OPENINGS + 1, 0, 0, 0])
    node.receive(1, "open", -1, (says, None), incarnation=1)
    assert 1 not in node.mail[1]


def test_a_greeting_that_is_late_opens_nothing():
    node = gossip_node(experiment(NOISY, METHODS["dsgd"]), 0)
    node.start()
    node.down(1)
    node.up(1)
    mine = node.links[1].mine
    node.receive(1, "open", 1, (np.array([7, 0, 1, 0]), None))
    node.receive(1, "open", 1, (np.array([6, mine, 1, 0]), None))  # of an opening before that
    assert node.links[1].state is OPENING
    node.receive(1, "open", 1, (np.array([7, mine, 1, 0]), None))
    assert node.links[1].state is OPEN


@pytest.mark.soak
@pytest.mark.parametrize("first", range(SEEDS, 5000, 100))
def test_with_faults_what_must_hold_holds_for_long(first):
    assert all(faulty(first + k, drop=0.2, check=check).settled for k in range(100))


def test_the_same_seed_gives_the_same_bits():
    one, two = faulty(11), faulty(11)
    assert one.counts == two.counts
    np.testing.assert_array_equal(one.x, two.x)


@pytest.mark.parametrize(
    ("method", "steps"),
    [(dsgt(lr=0.05), 700), (motef(lr=0.05, gamma=0.5, lam=0.5, compressor="topk(10)"), 600)],
)
def test_tracking_ends_at_the_optimum_whoever_died(method, steps):
    """The others give back what the dead had moved to them: no bias is left."""
    task = canonical()
    live = Simulation(experiment(task, method, "random-regular"), 3, steps)
    live.later(30.0, live.kill, 5)
    live.later(300.0, live.restart, 5)
    live.later(50.0, live.part, 0, 1)
    live.later(90.0, live.heal, 0, 1)
    live.run()
    assert live.counts["killed"] == live.counts["restarted"] == live.counts["parted"] == 1
    assert task.evaluate(live.x.mean(axis=0))["grad_norm"] < 1e-8


@pytest.mark.parametrize("name", ["cedas", "exact-diffusion"])
def test_a_method_whose_weights_may_not_change_waits(name):
    live = Simulation(experiment(NOISY, METHODS[name]), 0, 10)
    live.later(5.0, live.kill, 3)
    live.run(until_s=200.0)
    rounds_ = [node.round for node in live.nodes.values()]
    assert max(rounds_) < 10
    assert not any(node.bears for node in live.nodes.values())


@pytest.mark.parametrize("name", ["motef", "gradient-push", "deepsqueeze", "dsgd, combine first"])
@pytest.mark.parametrize("graph", ["ring", "matching"])
def test_a_node_goes_on_from_its_state(name, graph):
    """All nodes, with what is under way, through a checkpoint's tree: the same bits."""

    def run(cuts):
        live = Simulation(experiment(NOISY, METHODS[name], graph), 5, 20)
        for cut in cuts:
            live.run(until_s=cut)
            restored(live)
        return live.run()

    np.testing.assert_array_equal(run([]).x, run([3.0, 9.5, 17.0]).x)


def restored(live):
    for i, old in list(live.nodes.items()):
        live.nodes[i] = live._made(i, 0, False)
        live._do(i, live.nodes[i].restore(copy.deepcopy(old.state())))


BAD = [
    (1, "mail", 0, ()),
    (1, "mail", 0, (np.zeros(19),)),
    (1, "mail", 0, (np.zeros(20, np.float32),)),
    (1, "mail", 0, (np.full(20, np.nan),)),
    (1, "mail", 0, (b"what?",)),
    (4, "mail", 0, (np.zeros(20),)),
    (9, "mail", 0, (np.zeros(20),)),
    (0, "mail", 0, (np.zeros(20),)),
    (1, "offer", 0, (np.zeros(20),)),
    (1, "open", 0, ()),
    (1, "open", 5, (np.zeros(4), None)),
    (1, "open", 5, (np.array([1, 0, 9, 0]), None)),
    (1, "open", -1, (np.array([1, 0, 1, 0]), None)),
    (1, "open", 5, (np.array([1, 0, 1, 0]), np.zeros(7))),
]


@pytest.mark.parametrize("bad", BAD)
def test_what_no_node_sends_is_refused_and_changes_nothing(bad):
    node = gossip_node(experiment(NOISY, METHODS["dsgd"]), 0)
    node.start()
    before = pickle.dumps(node.state())
    with pytest.raises(PeerError):
        node.receive(*bad)
    assert pickle.dumps(node.state()) == before


def test_a_neighbour_cannot_be_far_ahead():
    node = gossip_node(experiment(NOISY, METHODS["dsgd"]), 0)
    node.start()
    for k in range(MOST_EARLY):
        node.receive(1, "mail", k, (np.zeros(20),))
    with pytest.raises(PeerError, match="node 1 is in round 2"):
        node.receive(1, "mail", MOST_EARLY, (np.zeros(20),))


# -- At their own pace ---------------------------------------------------------------------------

APACE = [
    (name, graph)
    for name, method in {**METHODS, "ad-psgd": ad_psgd(lr=0.03)}.items()
    for graph in ("ring", "random-regular", "matching", "exponential")
    if method.asynchronous and (method.pushes or not TOPOLOGIES.parse(graph, n=8).directed)
]


def check_apace(simulation, i):
    ends_agree(simulation, i)
    moves_are_kept(simulation, i)


def apace(seed, drop=0.05, **more):
    """An asynchronous run with faults, to its end."""
    name, graph = APACE[seed % len(APACE)]
    method = METHODS.get(name, ad_psgd(lr=0.03))
    setting = experiment(NOISY, method, graph, mode="asynchronous")
    live = Simulation(setting, seed, 20, drop=drop, double=0.05, **more)
    live.faults(5, 25.0)
    live.run()
    assert live.settled, f"tests/runtime/test_node.py: apace({seed})"
    nodes = live.nodes.values()
    assert min(node.round for node in nodes) >= 20  # who joins does its first gradient, too
    if "v" in method.channels:
        gain = method.channels["v"].gain
        v = sum(node.node.v + gain * node.node._got.get("v", 0.0) for node in nodes)
        np.testing.assert_allclose(v, sum(map(put_in, nodes)), atol=1e-9)
    return live


def test_at_their_own_pace_what_must_hold_holds():
    counts = sum((apace(seed, check=check_apace).counts for seed in range(SEEDS)), Counter())
    for happened in ("killed", "restarted", "parted", "lost", "doubled"):
        assert counts[happened] > 100
    assert counts["ends compared"] > 5_000
    assert counts["sums compared"] > 5_000


@pytest.mark.parametrize("seed", [3266, 4293])
def test_seeds_of_which_a_run_once_ended_while_a_link_was_open_at_one_end(seed):
    assert apace(seed, drop=0.2, check=check_apace).settled


@pytest.mark.soak
@pytest.mark.parametrize("first", range(SEEDS, 5000, 100))
def test_at_their_own_pace_what_must_hold_holds_for_long(first):
    assert all(apace(first + k, drop=0.2, check=check_apace).settled for k in range(100))


@pytest.mark.parametrize("seed", range(len(APACE)))
def test_messages_that_are_lost_move_nothing(seed):
    """Nodes start apart and only mix: with what they got, the sum stays, whatever is lost."""
    name, graph = APACE[seed]
    method = copy.copy(METHODS.get(name, ad_psgd()))
    method.lr = 0.0
    setting = experiment(NOISY, method, graph, mode="asynchronous")
    start = np.arange(8.0)[:, None] + np.zeros(20)
    live = Simulation(setting, seed, 20, drop=0.3, double=0.3, start=start).run()
    assert live.counts["lost"] > 20
    first = next(iter(method.channels))
    gain = 1.0 if method.pushes else method.channels[first].gain
    sums = sum(gain * node.node._got.get(first, 0.0) for node in live.nodes.values())
    if not method.pushes:  # else all is given away
        sums = sums + sum(node.node.x for node in live.nodes.values())
    np.testing.assert_allclose(sums / 8, 3.5, atol=1e-10)


@pytest.mark.parametrize("name", ["motef", "gradient-push", "deepsqueeze", "dsgd, combine first"])
@pytest.mark.parametrize("graph", ["ring", "matching"])
def test_at_its_own_pace_a_node_goes_on_from_its_state(name, graph):
    """All nodes, when nothing is under way: the same bits."""

    def run(cut):
        live = Simulation(experiment(NOISY, METHODS[name], graph, mode="asynchronous"), 5, 10)
        live.run()
        if cut:
            restored(live)
        live.limit = 20
        for i, node in live.nodes.items():
            live._do(i, node.extend(20))
        return live.run()

    whole = run(False)
    assert {node.round for node in whole.nodes.values()} == {20}
    np.testing.assert_array_equal(whole.x, run(True).x)
