"""Nodes at their own pace: what every asynchronous gossip run promises."""

import heapq
import itertools
from dataclasses import replace

import numpy as np
import pytest
from canonical import METHODS, canonical, pairs

import offbeat
from offbeat.algorithms.gossip import (
    ad_psgd,
    beer,
    deepsqueeze,
    dsgd,
    dsgt,
    momentum_tracking,
    motef,
)
from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.experiment.experiment import Experiment
from offbeat.runtime.experiment.settings import Evaluate, Stop
from offbeat.runtime.node.effects import Compute
from offbeat.runtime.node.make import gossip_node
from offbeat.runtime.node.network import Uplink
from offbeat.topologies import TOPOLOGIES, from_matrix
from offbeat.workers.fleet import Fleet, Outage

EXACT = canonical()
L = EXACT.smoothness
TRACKING = [
    dsgt(lr=0.1 / L),
    dsgt(lr=0.1 / L, order="combine-then-adapt"),
    momentum_tracking(lr=0.02 / L),
    beer(lr=0.1 / L, gamma=0.2, compressor="topk(4)"),
    motef(lr=0.1 / L, gamma=0.2, lam=0.2, compressor="topk(4)"),
]


@pytest.mark.parametrize(
    "fleet", ["8 1..8", "8 lognormal(0.5) loss=0.3", "8 1..4 latency_s=0.3 jitter_s=0.2"]
)
@pytest.mark.parametrize("method", TRACKING, ids=lambda method: str(method.spec))
def test_tracking_finds_the_optimum_at_any_speeds(method, fleet):
    made = pairs(EXACT, method, "ring", fleet, steps=900, every=900)
    made.run()
    assert np.linalg.norm(made._models() - EXACT.optimum) / 8**0.5 < 2e-4


def test_nobody_waits_for_a_straggler():
    slow = Fleet.parse("8 stragglers=1x10")
    made = pairs(EXACT, dsgd(lr=0.01), "ring", slow, steps=200, every=200)
    _, final = made.run()
    assert final["busy"] == pytest.approx(1.0)
    done = made.records.done
    assert done.sum() == final["gradients"] == 1600
    assert set(done[:7].tolist()) <= {225, 226}
    assert done[7] == 22
    # The neighbours of the straggler meet it unchanged nine times of ten.
    of_straggler = [age for i, j, _, _, age in made.facts()["edges"] if j == 7]
    assert max(of_straggler) == 9
    assert max(age for i, j, _, _, age in made.facts()["edges"] if 7 not in (i, j)) == 0


def test_a_node_that_is_away_loses_its_work_and_comes_back():
    fleet = Fleet(
        workers=8,
        outages=[Outage(worker=1, from_s=10.5, to_s=30), Outage(worker=2, from_s=50.5)],
        on_outage="lose",
    )
    made = pairs(EXACT, dsgt(lr=0.1 / L), "ring", fleet, steps=100, every=100)
    made.run()
    done = made.records.done
    assert done[2] == 50
    assert done[0] - done[1] == pytest.approx(19.5, abs=0.6)
    assert [event["worker"] for event in made.records.events] == [1, 2]
    assert [event["time_s"] for event in made.records.events] == [10.5, 50.5]
    spent = 6 * made.now_s + (made.now_s - 19.5 - 1) + 50  # lost work is no work
    assert made._measured()["busy"] == pytest.approx(spent / (8 * made.now_s), abs=0.01)
    before = made.nodes[2].model
    assert not np.array_equal(before, made.nodes[1].model)


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if not m.asynchronous])
def test_methods_with_duals_refuse(name):
    with pytest.raises(ConfigError, match="equally many rounds"):
        pairs(EXACT, METHODS[name], "ring")


def test_directed_graphs_are_for_pushing():
    with pytest.raises(ConfigError, match="directed"):
        pairs(EXACT, dsgd(), "exponential")
    made = pairs(EXACT, METHODS["gradient-push"], "exponential", "8 1..8", steps=50, every=50)
    assert made.run()[0] == "steps"


def test_what_comes_to_nobody_is_lost():
    away = [Outage(worker=1, from_s=1.5)]
    fleet = Fleet(workers=2, latency_s=1.0, on_outage="lose", outages=away)
    made = pairs(canonical(n=2), dsgd(lr=0.01), "complete", fleet, steps=20, every=20)
    made.run()
    assert made.counts()["messages"] == 2  # both offered, at once
    assert made.counts()["messages_lost"] == 1


def test_a_slow_job_that_is_lost_does_not_delay_the_next():
    fleet = Fleet(
        workers=2, speeds=[1.0, 100.0], on_outage="lose",
        outages=[Outage(worker=1, from_s=10.0, to_s=20.0)],
    )  # fmt: skip
    made = pairs(canonical(n=2), dsgd(lr=0.01), "complete", fleet, steps=65, every=65)
    made.run()
    assert made.now_s == 129.0
    assert made.records.done.tolist() == [129, 1]  # from 20 s to 120 s


def test_who_gives_all_away_has_nothing_to_divide():
    swap = from_matrix(np.array([[0.0, 1.0], [1.0, 0.0]]))
    with pytest.raises(ConfigError, match="keep a share"):
        pairs(canonical(n=2), METHODS["gradient-push"], swap)


def test_what_is_said_fits_its_message():
    """Also where a node has got something since it published: no more than k numbers are told."""
    method = deepsqueeze(lr=0.01, compressor="topk(4)")
    made = pairs(EXACT, method, "ring", "8 1..8", steps=50, every=50)
    told, do = [], made._do

    def noted(i, effects):
        for effect in effects:
            told.extend(map(np.count_nonzero, getattr(effect, "spoken", {}).values()))
        do(i, effects)

    made._do = noted
    made.run()
    assert max(told) == 4


@pytest.mark.parametrize("name", ["dsgd", "choco", "gradient-push"])
def test_a_link_carries_no_more_than_its_bandwidth(name):
    made = pairs(EXACT, METHODS[name], "complete", "8 bandwidth=100.0", steps=50, every=50)
    made.run()
    free_s, sent = [uplink._free_s for uplink in made.uplinks], made.counts()["bytes"]
    assert max(free_s) - made.now_s < 2 * 7 * 2 * 168 / 100  # what waits is bounded
    assert sent <= 100 * sum(free_s)
    assert sent > 0.5 * 100 * 8 * made.now_s


@pytest.mark.parametrize("name", ["gradient-push", "dsgt", "motef"])
def test_little_is_under_way_whatever_the_latency(name):
    made = pairs(EXACT, METHODS[name], "ring", "8 latency_s=60.0", steps=1000, every=1000)
    made._start()
    most = 0
    for _ in range(8000):
        made._advance()
        most = max(most, len(made.heap))
    assert most <= 8 + 16  # a gradient a node, a message a link and direction
    if name == "gradient-push":  # which else gives all it has away before anything comes
        weights = [float(node.node.w[0]) for node in made.nodes]
        assert min(weights) > 0.1


def test_ad_psgd_is_asynchronous_without_being_told():
    result = offbeat.run("quadratic(5)", "ad-psgd", "8 1..4", "ring", stop={"steps": 20})
    assert result.experiment.asynchronous
    assert result.final["staleness_mean"] > 1


def test_an_exchange_with_one_neighbour_is_the_average():
    """AD-PSGD's step: both at (x_i + x_j)/2, and the gradient of before."""
    start = np.arange(2.0)[:, None] * np.ones(20)
    task = canonical(n=2)
    made = pairs(task, ad_psgd(lr=0.1), "complete", "2 1..3", steps=10**6, initial=start)
    made._start()
    for _ in range(4):  # both offer, and that of node 0 counts: they meet before they are done
        made._advance()
    assert made.now_s == 0.0
    made._advance()  # node 0 is done first
    g = task.gradient(start[:1], np.array([0]), np.array([0]))[1][0]
    told = 0.5 - 0.1 * g
    np.testing.assert_allclose(made.nodes[0].node.x, told, atol=1e-14)
    for _ in range(3):  # it offers, and is answered, and confirms
        made._advance()
    assert made.now_s == 1.0
    mean = (told + 0.5) / 2
    got = [node.node._got["x"] for node in made.nodes]  # mixed in at their next steps
    np.testing.assert_allclose(got[0], mean - told, atol=1e-14)
    np.testing.assert_allclose(start[1] + got[1], mean, atol=1e-14)


def live(made, rounds):
    """The models of live nodes that do what ``made`` does: gradients one by one, frames read."""
    fleet, heap, order = made.fleet, [], itertools.count()
    clock = fleet.timing(0, 0).clock
    e = Experiment(
        task=made.task, algorithm=made.method, topology=made.network.topology, fleet=fleet,
        mode="asynchronous", stop=Stop(steps=1), evaluate=Evaluate(steps=1), seed=0,
    )  # fmt: skip
    nodes = [gossip_node(e, i) for i in range(made.n)]
    uplinks = [Uplink(fleet, 0, i) for i in range(made.n)]

    def do(i, effects, now_s):
        for effect in effects:
            if isinstance(effect, Compute):
                event = clock.finish(i, effect.number, now_s, 1), effect
            else:
                to, serial = effect.to, uplinks[i].serial(effect.to)
                event = now_s + uplinks[i].delay_s(now_s, to, effect.nbytes, serial), effect
            heapq.heappush(heap, (event[0], next(order), i, effect))

    for i, node in enumerate(nodes):
        do(i, node.start(), 0.0)
    while heap and sum(node.round for node in nodes) < rounds * made.n:
        now_s, _, i, event = heapq.heappop(heap)
        if isinstance(event, Compute):
            do(i, nodes[i].computed(event.number, *nodes[i].answer(event)), now_s)
        else:
            effects = nodes[event.to].receive(i, event.kind, event.number, event.items)
            do(event.to, effects, now_s)
    return np.stack([node.model for node in nodes])


FLEETS = ["8 1..3", "8 lognormal(0.5) latency_s=0.3 jitter_s=0.2 bandwidth=2000.0"]
PAUSE = [Outage(worker=2, from_s=2.5, to_s=6.0)]


@pytest.mark.parametrize("graph", ["ring", "exponential", "random-regular"])
@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.asynchronous] + ["ad-psgd"])
def test_live_nodes_do_what_virtual_ones_do(name, graph):
    """Bit for bit: with and without latency, loss and outages."""
    method = METHODS.get(name) or ad_psgd(lr=0.03)
    made = TOPOLOGIES.parse(graph, n=8)
    if made.directed and not method.pushes:  # who exchanges does so both ways
        made = from_matrix((made.matrix(0) + made.matrix(0).T).toarray() / 2)
    for text, loss, outages in itertools.product(FLEETS, (0.0, 0.3), ([], PAUSE)):
        fleet = replace(Fleet.parse(text), loss=loss, outages=outages)
        virtual = pairs(canonical(noise=0.1), method, made, fleet, steps=4, every=4)
        virtual.run()
        assert (virtual.counts()["messages_lost"] > 0) == (loss > 0)
        assert virtual.heap
        np.testing.assert_array_equal(virtual._models(), live(virtual, 4))


@pytest.mark.parametrize("name", ["dsgd", "dsgt", "beer", "gradient-push"])
def test_no_latency_is_the_limit_of_small_ones(name):
    ends = []
    for latency_s in (0.0, 1e-9):
        fleet = Fleet(workers=8, latency_s=latency_s)
        made = pairs(canonical(noise=0.1), METHODS[name], "ring", fleet, steps=300, every=300)
        made.run()
        ends.append(made._models())
    np.testing.assert_allclose(*ends, atol=1e-6, rtol=0)
