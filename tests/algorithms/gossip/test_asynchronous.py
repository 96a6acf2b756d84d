"""Nodes at their own pace: what every asynchronous gossip run promises."""

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
from offbeat.topologies import from_matrix
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
    before = made.nodes[2].x
    assert not np.array_equal(before, made.nodes[1].x)


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
    assert made.messages == made.messages_lost == 1


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
    told, heard = [], made._heard
    made._heard = lambda i, j, name, said: (
        told.append(np.count_nonzero(said)) or heard(i, j, name, said)
    )
    made.run()
    assert max(told) == 4


@pytest.mark.parametrize("name", ["dsgd", "choco", "gradient-push"])
def test_a_link_carries_no_more_than_its_bandwidth(name):
    made = pairs(EXACT, METHODS[name], "complete", "8 bandwidth=100.0", steps=50, every=50)
    made.run()
    assert max(made.link_s) - made.now_s < 2 * 7 * 2 * 168 / 100  # what waits is bounded
    assert made.bytes <= 100 * sum(made.link_s)
    assert made.bytes > 0.5 * 100 * 8 * made.now_s


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
        weights = [float(node.w[0]) for node in made.nodes]
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
    made._advance()  # node 0 is done first
    g = task.gradient(start[:1], np.array([0]), np.array([0]))[1][0]
    told = 0.5 - 0.1 * g  # they had met before they began
    mean = (told + 0.5) / 2
    np.testing.assert_allclose(made.nodes[0].x, told, atol=1e-14)  # mixed in at its next step
    np.testing.assert_allclose(made.channels[0].got["x"], mean - told, atol=1e-14)
    np.testing.assert_allclose(start[1] + made.channels[1].got["x"], mean, atol=1e-14)
