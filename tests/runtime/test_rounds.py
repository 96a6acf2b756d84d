"""Synchronous gossip under the virtual clock: who waits for whom, and for how long."""

import numpy as np
import pytest
from canonical import canonical, ctad, engine, pairs, rounds
from scipy import sparse

import offbeat
from offbeat.algorithms.gossip import choco, deepsqueeze, dsgd, dsgt
from offbeat.runtime.base.errors import ConfigError, Diverged
from offbeat.runtime.gossip.pairs import Pairs
from offbeat.runtime.gossip.rounds import Rounds
from offbeat.topologies import TOPOLOGIES, Topology
from offbeat.workers.fleet import Fleet, Outage
from offbeat.workers.tasks import Quadratic, logistic, quadratic
from offbeat.workers.work import WORK

TASK = canonical()


def ends(method, topology, fleet, steps=30):
    """``[steps, n]``: when each node ends each round."""
    made, found = rounds(TASK, method, topology, fleet), []
    for _ in range(steps):
        made._advance()
        found.append(made.end_s)
    return np.array(found)


def test_a_straggler_slows_its_neighbours_then_theirs():
    """start_i(k) = max of the ends of i and of whom it hears, one round before."""
    found = ends(dsgd(), "path", "8 1..1 stragglers=1x5", steps=8)
    # Node 7 takes 5 s a round; a node at distance r is held up from round r on.
    for k in range(8):
        for i in range(8):
            distance = 7 - i
            late = max(0, k + 1 - distance) if distance <= k else 0
            waited = 5.0 * late + (k + 1 - late) if late else k + 1.0
            assert found[k, i] == pytest.approx(waited)


def test_the_recursion_by_hand():
    fleet = Fleet.parse("8 lognormal(1.0) latency_s=0.2 bandwidth=1000.0 jitter_s=0.1")
    found = ends(dsgd(), "random-regular", fleet)
    timing = fleet.timing(0, 0)
    w = TOPOLOGIES.parse("random-regular", n=8).matrix(0).toarray()
    end, arrives = np.zeros(8), np.zeros(8)
    for k in range(30):
        start = np.array([max(end[i], *arrives[(w[i] > 0) & (np.arange(8) != i)])
                          for i in range(8)])  # fmt: skip
        end = np.array([timing.clock.finish(i, k + 1, start[i]) for i in range(8)])
        np.testing.assert_allclose(found[k], end, rtol=1e-12)
        bytes_ = 3 * (8 + 20 * 8)  # one dense message to each of three neighbours
        arrives = end + 0.2 + timing.jitters(k + 1) + bytes_ / 1000.0


def test_messages_travel_during_the_gradient_where_the_method_lets_them():
    fleet = "8 latency_s=0.8"
    assert ends(dsgd(), "ring", fleet)[-1].max() == pytest.approx(30 + 29 * 0.8)
    assert ends(ctad(0.01), "ring", fleet)[-1].max() == pytest.approx(30.0)
    assert ends(choco(order="overlapped"), "ring", fleet)[-1].max() == pytest.approx(30.0)


def test_the_first_gradient_takes_time():
    assert ends(dsgt(), "ring", "8")[0].tolist() == [2.0] * 8


def test_nodes_sit_rounds_out():
    away = [Outage(worker=3, from_s=4.5, to_s=10.5), Outage(worker=0, from_s=20.5)]
    fleet = Fleet(workers=8, outages=away, on_outage="lose")
    made = rounds(TASK, dsgd(lr=0.01), "ring", fleet)
    for _ in range(30):
        before = made.node.x
        made._advance()
        stood = (made.node.x == before).all(axis=1)
        assert stood[3] == (5 <= made.round - 1 <= 10)
        assert stood[0] == (made.round - 1 >= 21)
        assert not stood[[1, 2, 4, 5, 6, 7]].any()
    assert made.end_s[1] == 30.0  # nobody waited
    made.records.flush()
    assert made.records.done.tolist() == [21, 30, 30, 24, 30, 30, 30, 30]


def test_a_short_absence_is_no_wait_for_the_slowest():
    fleet = Fleet(workers=8, speeds=[1.0] * 7 + [100.0], on_outage="lose",
                  outages=[Outage(worker=3, from_s=0.5, to_s=1.5)])  # fmt: skip
    found = ends(dsgd(lr=0.01), "path", fleet, steps=4)
    assert found[:, 3].tolist() == [1.0, 1.0, 3.0, 4.0]
    assert found[:, 2].tolist() == [1.0, 2.0, 3.0, 4.0]


def test_what_a_node_sends_on_its_return_is_counted_as_it_was():
    away = [Outage(worker=3, from_s=4.5, to_s=10.5)]
    fleet = Fleet(workers=8, outages=away, on_outage="lose")
    made = rounds(TASK, deepsqueeze(lr=0.05, compressor="threshold(0.2)"), "ring", fleet)
    sizes = []
    for _ in range(12):
        made._advance()
        q, sized = made.node._wires["q"].value[3], made.node._wires["q"].sizes[3]
        sizes.append((np.count_nonzero(q), int(sized)))
    assert len(set(sizes[4:11])) == 1
    assert len(set(sizes)) > 3


def test_everybody_away_at_once_is_waited_out():
    away = [Outage(worker=i, from_s=4.5, to_s=9.0 + i) for i in range(8)]
    fleet = Fleet(workers=8, outages=away, on_outage="lose")
    made = rounds(TASK, dsgd(lr=0.01), "ring", fleet)
    while made.time_s < 20:
        assert made._advance()
    gone = Fleet(workers=8, outages=[Outage(worker=i, from_s=4.5) for i in range(8)],
                 on_outage="lose")  # fmt: skip
    made = rounds(TASK, dsgd(lr=0.01), "ring", gone)
    assert [made._advance() for _ in range(6)] == [True] * 5 + [False]
    assert made.time_s == 5.0


def test_paused_nodes_are_waited_for():
    fleet = Fleet(workers=8, outages=[Outage(worker=3, from_s=4.5, to_s=10.5)])
    found = ends(dsgd(), "complete", fleet)
    assert found[4].max() == 11.0
    assert found[-1].max() == 36.0


def test_metrics_are_of_the_mean_and_the_worst():
    made = rounds(TASK, dsgd(lr=0.02), "ring")
    for _ in range(20):
        made._advance()
    row, x = made._measured(), made.node.x
    mean = x.mean(axis=0)
    assert row["loss"] == pytest.approx(TASK.evaluate(mean)["loss"])
    worst = x[np.linalg.norm(x - mean, axis=1).argmax()]
    assert row["loss_worst"] == pytest.approx(TASK.evaluate(worst)["loss"])
    assert row["consensus"] ** 2 == pytest.approx(((x - mean) ** 2).sum(axis=1).mean())
    assert row["bytes_edge"] == pytest.approx(row["bytes"] / (20 * 16))


@pytest.mark.parametrize("mode", ["synchronous", "asynchronous"])
@pytest.mark.parametrize("method", ["dsgd(lr=50.0)", "motef(lr=50.0)"])
def test_too_large_steps_are_one_sentence(method, mode):
    with pytest.raises(Diverged, match="take a smaller step size"):
        offbeat.run("quadratic(4, spread=1.0)", method, "6", "ring", mode=mode)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"algorithm": "dsgd"}, "give a topology"),
        ({"algorithm": "pure", "topology": "ring"}, "no topology"),
        ({"algorithm": "pure", "mode": "synchronous"}, "no mode"),
        ({"algorithm": "pure", "fleet": "8 loss=0.1"}, "loss is for gossip"),
        ({"algorithm": "dsgd", "topology": "ring:7"}, "7 nodes, but the fleet has 8"),
        ({"algorithm": "dsgd", "topology": "ring", "mode": "sync"}, "mode must be one of"),
        ({"algorithm": "dsgd", "topology": "ring", "replicas": "sum"}, "replicas must be one of"),
        ({"algorithm": "ad-psgd", "topology": "ring", "mode": "synchronous"}, "by its nature"),
        ({"algorithm": "cedas(compressor='topk(2)')", "topology": "ring"}, "needs an unbiased"),
        ({"algorithm": "cedas", "topology": "base"}, "here the graph does"),
        ({"algorithm": "cedas", "topology": "ring", "fleet": "8 loss=0.1"}, "messages are lost"),
        ({"algorithm": "cedas", "topology": "exponential"}, "symmetric"),
        ({"algorithm": "exact-diffusion", "topology": "exponential"}, "symmetric"),
        ({"algorithm": "motef", "topology": "base", "replicas": "global", "fleet": "8 loss=0.1"},
         "needs every message"),
        ({"algorithm": "dsgd", "topology": "exponential", "fleet": "8 loss=0.1"}, "directed"),
        ({"algorithm": "pure", "replicas": "global"}, "no replicas"),
        ({"algorithm": "dsgd", "topology": "ring", "fleet": "8 latency_s=1e300"}, "latency_s"),
        ({"algorithm": "dsgd", "topology": "ring", "fleet": "8 bandwidth=1e-300"}, "bandwidth"),
        ({"algorithm": "motef(lam=1.5)", "topology": "ring"}, "lam"),
        ({"algorithm": "choco(compressor='topkk')", "topology": "ring"}, 'mean "topk"'),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(wrong, said):
    given = {"fleet": "8", **wrong}
    with pytest.raises(ConfigError, match=said):
        offbeat.run("quadratic(4)", stop={"steps": 1}, **given)


@pytest.mark.parametrize(
    ("algorithm", "sums", "said"),
    [("gradient-push", 0, "columns"), ("dsgd", 0, "columns"), ("dsgd", 1, "rows")],
)
def test_weights_that_lose_the_mean_are_refused(algorithm, sums, said):
    """Rows (1) or columns (0) of the weights do not sum to 1."""
    w = sparse.csr_array([[0.5, 0.5], [0.2, 0.8]])
    made = Topology(2, lambda k: w if sums == 0 else w.T, directed=True)
    with pytest.raises(ConfigError, match=f"whose {said} sum to 1"):
        offbeat.run("quadratic(4)", algorithm, "2", made, stop={"steps": 1})


def test_reassigning_is_for_servers():
    fleet = Fleet(workers=8, outages=[Outage(worker=0, from_s=1.0)], on_outage="reassign")
    with pytest.raises(ConfigError, match="reassign"):
        offbeat.run(Quadratic(np.zeros((8, 3))), "dsgd", fleet, "ring")


def test_nobody_can_wait_for_ever():
    fleet = Fleet(workers=8, outages=[Outage(worker=3, from_s=4.5)])
    with pytest.raises(ConfigError, match="worker 3 pauses for ever"):
        rounds(TASK, dsgd(), "ring", fleet)
    assert pairs(TASK, dsgd(lr=0.01), "ring", fleet, steps=20, every=20).run()[0] == "steps"


@pytest.mark.parametrize("mode", ["synchronous", "asynchronous"])
def test_local_steps_between_rounds(mode):
    """What they moved takes the gradient's place; one step is a gradient times its rate."""
    task, more = "quadratic(4, noise=0.1)", {"topology": "ring", "mode": mode}

    def run(method, work, steps=30):
        return offbeat.run(task, method, "6 1..3", work=work, stop={"steps": steps}, **more)

    plain, local = (
        run("dsgd(lr=0.1)", "gradient"),
        run("dsgd(lr=1.0)", "local-steps(sgd(0.1), steps=1)"),
    )
    np.testing.assert_allclose(plain.x, local.x, atol=1e-14)
    four = run("dsgd(lr=1.0)", "local-steps(sgd(0.1), steps=4)")
    assert four.final["gradients"] == 4 * local.final["gradients"]
    assert four.final["time_s"] == pytest.approx(4 * local.final["time_s"])
    assert run("motef-vr", "local-steps(sgd(0.1), steps=4)").final["loss"] < four.metrics[0]["loss"]
    adamw = "local-steps(adamw(lr=0.01), steps=4%s)"
    kept, fresh = (run("dsgd(lr=1.0)", adamw % more) for more in ("", ", fresh=true"))
    assert kept.final["loss"] < kept.metrics[0]["loss"]
    assert not np.array_equal(kept.x, fresh.x)


def test_what_nodes_keep_between_rounds_is_theirs_as_it_is_of_workers():
    """Averaged with everybody, local AdamW is Local-SGD with a server, moments and all."""
    task = logistic("digits", workers=4, batch="full")
    options = {"work": "local-steps(adamw(lr=0.01), steps=3)", "stop": {"steps": 20}}
    gossip = offbeat.run(task, "dsgd(lr=1.0)", "4", "complete", **options)
    server = offbeat.run(task, "local-sgd", "4 1.0", **options)
    np.testing.assert_allclose(gossip.x, server.x, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", ["synchronous", "asynchronous"])
def test_what_nodes_keep_is_resumed_and_theirs_while_they_are_away(mode, tmp_path):
    fleet = offbeat.Fleet(
        workers=4, speeds="lognormal(0.5)", on_outage="lose",
        outages=[offbeat.Outage(worker=2, from_s=9.5, to_s=40.0)],
    )  # fmt: skip
    experiment = {
        "task": "quadratic(4, noise=0.2)", "algorithm": "dsgd(lr=0.7)", "fleet": fleet,
        "topology": "ring", "mode": mode, "work": "local-steps(adamw(lr=0.05), steps=2)",
        "evaluate": {"steps": 7},
    }  # fmt: skip
    whole = offbeat.run(**experiment, stop={"steps": 60})
    offbeat.run(**experiment, stop={"steps": 17}, folder=tmp_path / "r")
    again = offbeat.resume(tmp_path / "r", overrides=["stop.steps=60"])
    np.testing.assert_array_equal(whole.x, again.x)
    assert whole.metrics == again.metrics
    work = WORK.parse("local-steps(adamw(lr=0.05), steps=2)")
    task = quadratic(4, noise=0.2, workers=4)
    made = engine(
        Rounds if mode == "synchronous" else Pairs, task, dsgd(lr=0.7), "ring", fleet,
        steps=60, every=60, work=work,
    )  # fmt: skip
    made.run()
    kept = made._kept if mode == "synchronous" else made.kept
    assert kept["steps"].tolist() == (2 * made.records.done).tolist()
    assert kept["steps"][2] < min(kept["steps"][w] for w in (0, 1, 3)) - 20


def test_large_networks_run():
    task = Quadratic(np.random.default_rng(0).standard_normal((3000, 5)))
    method, graph = "choco(compressor='qsgd(4)')", "random-regular(degree=4)"
    result = offbeat.run(task, method, "3000 exponential", graph, stop={"steps": 20})
    assert result.final["gradients"] == 60_000
    assert len(result.trace) == 0  # beyond a thousand nodes, jobs are counted only


def test_a_run_may_end_at_a_level_of_any_metric():
    stop = {"steps": 500, "loss_worst": 0.1}
    result = offbeat.run("least-squares(5)", "dsgt(lr=0.01)", topology="ring:6", stop=stop)
    *before, last = result.column("loss_worst")
    assert result.reason == "target loss_worst"
    assert last <= 0.1 < min(before)
    with pytest.raises(ConfigError, match=r'"loss_wrost" .* did you mean "loss_worst"'):
        offbeat.run("least-squares(5)", "dsgt", topology="ring:6", stop={**stop, "loss_wrost": 1})
