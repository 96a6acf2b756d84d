"""Speed laws and fleets: means, addresses, windows, links, text forms."""

import gzip
import re
from itertools import pairwise

import numpy as np
import pytest

import offbeat
from offbeat import ConfigError, Fleet, Outage
from offbeat.algorithms.server import pure
from offbeat.runtime.run.records import column
from offbeat.workers.speeds import SPEEDS, parse, recorded_times
from offbeat.workers.tasks import quadratic


def durations(text, count=20000, workers=2, seed=0):
    clock = parse(text).clock(workers, seed)
    return np.array([clock.finish(1, i, 0.0) for i in range(count)])


HALF_NORMAL = np.exp(-0.5) * np.sqrt(2 / np.pi) + (2 * 0.8413447 - 1)  # E|N(1, 1)| = 1.1666


@pytest.mark.parametrize(
    ("text", "mean"),
    [
        ("constant(3.0)", 3.0),
        ("3", 3.0),
        ("exponential(3.0)", 3.0),
        ("gamma(0.5, mean=3.0)", 3.0),
        ("lognormal(0.7, mean=3.0)", 3.0),
        ("poisson(3.0)", 3.0),
        ("uniform(3.0)", 3.0 / 2 + 1),
        ("normal(3.0)", HALF_NORMAL * 3 + 1),
    ],
)
def test_laws_have_their_means(text, mean):
    drawn = durations(text)
    assert drawn.mean() == pytest.approx(mean, rel=0.03)
    assert (drawn >= 0).all()


def test_every_law_is_covered_and_has_a_text():
    laws = {
        "list": "list([1.0, 2.0])", "markov": "markov(10.0)", "periodic": "periodic(50.0)",
        "trace": None,
    }  # fmt: skip
    for name in SPEEDS:
        text = laws.get(name, name)
        if text is not None:
            assert parse(text).clock(2, 0).finish(1, 0, 5.0) >= 5.0


def test_durations_are_addressed():
    """Asking one worker more often does not change what another gets."""
    one, other = parse("lognormal(1.0)").clock(3, 7), parse("lognormal(1.0)").clock(3, 7)
    for number in range(100):
        one.finish(0, number, 0.0)
    for number in range(100):
        assert one.finish(2, number, 0.0) == other.finish(2, number, 0.0)
    assert parse("lognormal(1.0)").clock(3, 8).finish(2, 0, 0.0) != other.finish(2, 0, 0.0)


def test_once_per_worker():
    clock = parse("lognormal(1.0, per=worker)").clock(50, 0)
    firsts = [clock.finish(w, 0, 0.0) for w in range(50)]
    assert len(set(firsts)) == 50
    assert [clock.finish(w, 9, 0.0) for w in range(50)] == firsts


def test_ranges_lists_and_stragglers():
    fleet = Fleet(workers=4, speeds="1..4", stragglers="1x10")
    clock = fleet.law().clock(4, 0, fleet.factors())
    assert [clock.finish(w, 0, 0.0) for w in range(4)] == [1, 2, 3, 40]
    clock = Fleet(workers=3, speeds=[2.0, 1.0, 5.0]).law().clock(3, 0)
    assert [clock.finish(w, 0, 0.0) for w in range(3)] == [2, 1, 5]


def test_periodic_integrates_over_its_phases():
    clock = parse("periodic(10.0, slowdown=2.0)").clock(1, 0)
    assert clock.finish(0, 0, 0.0) == 1.0  # in the fast half
    assert clock.finish(0, 1, 4.5) == 5.0 + 2 * 0.5  # half a second of work is left when it slows
    assert clock.finish(0, 2, 9.5) == 10.0 + 0.75  # a quarter is done when it is fast again


def test_markov_spends_its_time_as_it_says():
    clock = parse("markov(10.0, fast_s=100.0, slow_s=20.0)").clock(1, 3)
    now, jobs = 0.0, 0
    while now < 50_000:
        now, jobs = clock.finish(0, jobs, now), jobs + 1
    expected = 50_000 * (100 + 20 / 10) / 120
    assert jobs == pytest.approx(expected, rel=0.05)


def test_a_trace_file_is_cycled_and_checked(tmp_path):
    path = tmp_path / "times.csv"
    path.write_text("worker,seconds\n0,1.5\n1,2\n0,0.5\n")
    clock = parse(f'trace("{path}")').clock(2, 0)
    assert [clock.finish(0, i, 0.0) for i in range(3)] == [1.5, 0.5, 1.5]
    with pytest.raises(ConfigError, match="no times for worker 2"):
        Fleet(workers=3, speeds=f'trace("{path}")')
    with pytest.raises(ConfigError, match="cannot be read"):
        Fleet(workers=1, speeds='trace("/nowhere")')


TRACES = [
    ("worker,start,duration\n0,5,6\n", [[6.0]]),
    ("# worker,start,duration\n0,5,6\n", [[6.0]]),
    ("0,5,6\n", [[1.0]]),
    ('\ufeff"Worker","Start","End"\n0,5,6\n', [[1.0]]),
    ("end;worker;start\n6,5;1;5,0\n3;1;0\n8;2;0\n", [[3.0, 1.5], [8.0]]),
    ("duration\tworker\n1\tw10\n3\tw2\n4\tw10\n", [[3.0], [1.0, 4.0]]),
    ("rank seconds\n4.0 1e-1\n3.0 2\n", [[2.0], [0.1]]),
    (",worker,seconds\n0,3,1\n1,4,2\n", [[1.0], [2.0]]),  # as pandas writes it
]


@pytest.mark.parametrize(("text", "times"), TRACES)
def test_a_trace_says_by_its_header_what_its_columns_are(tmp_path, text, times):
    path = tmp_path / "times.csv"
    path.write_text(text)
    assert recorded_times(path, len(times)) == times
    packed = tmp_path / "times.csv.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    assert Fleet.parse(f"trace:{packed}").workers == len(times)
    assert recorded_times(packed, len(times)) == times


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("worker,when,seconds\n0,1,2\n", 'unknown column "when"; a trace has worker,seconds or'),
        ("worker,end\n0,1\n", "has the columns end, worker; a trace has"),
        ("0,1,2,3\n", 'line 1: "0,1,2,3" has 4 columns and no header; a trace has'),
        ("0;1.5;2,5\n", 'numbers have commas as in "2,5"; write a point in all of them'),
        ("0 1,5\n", '"1,5" may be one number or two'),
        ("0,1\n1;2\n", 'line 1: "0,1" has no semicolon, and other lines are cut at one'),
        ("0,1\n1,2,3\n", 'line 2: "1,2,3" has 3 columns, and line 1 has 2'),
        ("worker,seconds\n0,fast\n", 'line 2: "0,fast": its seconds "fast" is no number'),
        ("0,1\n0,nan\n", 'line 2: "0,nan": its seconds "nan" is no number'),
        ("0,5,3\n", "line 1: -2 is not a time"),
        ("a,1\nb,2\nc,3\n", "has times of the 3 workers a, b, c, and the fleet has 2"),
        ("3,1\n5,2\n", "line 2: there is no worker 5"),
    ],
)
def test_a_trace_that_could_be_read_in_two_ways_is_refused(tmp_path, text, said):
    path = tmp_path / "times.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(said)):
        Fleet(workers=2, speeds=f"trace({str(path)!r})")


def test_a_run_can_be_the_trace_of_another(tmp_path):
    task = quadratic(3, workers=4)
    first = offbeat.run(
        task, "pure", "4 lognormal(1.0)", stop={"steps": 200}, folder=tmp_path / "a"
    )
    law = f'trace("{tmp_path / "a" / "trace.jsonl"}")'
    again = offbeat.run(task, "pure", Fleet(workers=4, speeds=law), stop={"steps": 150})
    # Times are kept as durations, so instants agree to rounding.
    np.testing.assert_allclose(again.trace, first.trace[:150], rtol=1e-12, atol=1e-12)


def test_links_add_latency_and_bytes_over_bandwidth():
    task = quadratic(1000, workers=2)  # 8,000 bytes
    fleet = Fleet(workers=2, speeds=1.0, latency_s=0.25, bandwidth=16_000.0)
    trace = offbeat.run(task, pure(lr=0.1), fleet, stop={"steps": 20}).trace
    np.testing.assert_allclose(column(trace, "end_s") - column(trace, "start_s"), 1.0)
    np.testing.assert_allclose(column(trace, "time_s") - column(trace, "end_s"), 0.75)
    mine = trace[column(trace, "worker") == 0]
    np.testing.assert_allclose(column(mine, "time_s"), 2.5 * np.arange(1, 11))


def test_jitter_keeps_the_order_of_a_link():
    task = quadratic(3, workers=3)
    fleet = Fleet(workers=3, speeds=0.1, jitter_s=5.0)
    trace = offbeat.run(task, "random", fleet, stop={"steps": 500}).trace
    assert (np.diff(column(trace, "time_s")) >= 0).all()
    for worker in range(3):
        mine = trace[column(trace, "worker") == worker]
        assert (np.diff(column(mine, "job")) == 1).all()
        assert (column(mine, "start_s")[1:] >= column(mine, "end_s")[:-1]).all()


def test_a_paused_worker_stands_still():
    task = quadratic(3, workers=2)
    windows = [Outage(worker=0, from_s=4.5, to_s=10.0), Outage(worker=0, from_s=12.0, to_s=13.0)]
    fleet = Fleet(workers=2, speeds=1.0, outages=windows)
    result = offbeat.run(task, "pure", fleet, stop={"seconds": 16.5})
    mine = result.trace[column(result.trace, "worker") == 0]
    ends = [1, 2, 3, 4, 10.5, 11.5, 13.5, 14.5, 15.5]
    np.testing.assert_allclose(column(mine, "end_s"), ends)
    assert result.final["busy"] == pytest.approx((16.5 - 6.5 + 16.5) / 33)


def test_what_is_begun_in_a_pause_ends_after_it_however_short_it_is():
    task = quadratic(3, workers=2)
    windows = [Outage(worker=0, from_s=4.5, to_s=10.0), Outage(worker=1, from_s=20.0)]
    clock = Fleet(workers=2, speeds="poisson(0.01)", outages=windows).timing(0, 0).clock
    assert [clock.finish(0, 1, start_s) for start_s in (4.0, 4.5, 7.0, 10.0)] == [4, 10, 10, 10]
    assert clock.finish(1, 1, 21.0) == np.inf
    fleet = Fleet(workers=2, speeds="poisson(0.7)", outages=windows[:1])
    trace = offbeat.run(task, "random", fleet, stop={"steps": 100}).trace
    assert (np.diff(column(trace, "time_s")) >= 0).all()
    assert (column(trace, "end_s") >= column(trace, "start_s")).all()


def test_lost_jobs_are_lost_and_reassigned_ones_are_not():
    task = quadratic(3, workers=3)
    outages = [Outage(worker=0, from_s=4.5, to_s=10.0)]
    for policy, in_flight in (("lose", 2), ("reassign", 3)):
        fleet = Fleet(workers=3, speeds=1.0, outages=outages, on_outage=policy)
        result = offbeat.run(task, "pure", fleet, stop={"seconds": 20}, evaluate={"seconds": 1})
        during = [row["outstanding"] for row in result.metrics if 5 < row["time_s"] < 10]
        after = [row["outstanding"] for row in result.metrics if row["time_s"] > 10]
        assert set(during) == {in_flight}
        assert set(after) == {3}
        assert (result.facts["lost"], result.facts["reassigned"]) == (
            (1, 0) if policy == "lose" else (0, 1)
        )


def test_a_fleet_that_never_returns_ends_the_run():
    task = quadratic(3, workers=2)
    for policy in ("pause", "lose", "reassign"):
        outages = [Outage(worker=w, from_s=5.0) for w in (0, 1)]
        fleet = Fleet(workers=2, speeds=1.0, outages=outages, on_outage=policy)
        result = offbeat.run(task, "minibatch", fleet, stop={"steps": 1000})
        assert result.reason == "idle"
        assert result.final["step"] in (8, 10)


@pytest.mark.parametrize(
    "text",
    [
        "16 lognormal(1.0) stragglers=2x10",
        "4 1..10 latency_s=0.5 bandwidth=1000.0",
        "3",
        "3 [1.0, 2.0, 3.0]",
    ],
)
def test_text_form_is_printed_back(text):
    fleet = Fleet.parse(text)
    assert str(Fleet.parse(str(fleet))) == str(fleet)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"workers": 0}, "workers.*greater than or equal to 1"),
        ({"workers": 2.5}, "workers.*integer"),
        ({"wrkers": 3}, 'unknown key "wrkers"; did you mean "workers"'),
        ({"speeds": "lognrmal(1)"}, 'did you mean "lognormal"'),
        ({"speeds": "lognormal(-1.0)"}, "sigma.*greater than or equal to 0"),
        ({"speeds": "lognormal(sgma=1.0)"}, 'unknown key "sgma"; did you mean "sigma"'),
        ({"speeds": "constant(nan)"}, "positive and at most"),
        ({"speeds": -1.0}, "greater than 0"),
        ({"speeds": "-1"}, "positive"),
        ({"speeds": [[1.0]]}, "seconds.0. should be a valid number"),
        ({"speeds": ["a"]}, "valid number"),
        ({"speeds": "poisson(1e19)"}, "less than or equal to"),
        ({"speeds": "constant(lr=1)+(2)"}, "cannot read the speed law"),
        ({"speeds": "5..x"}, "cannot read the seconds"),
        ({"speeds": "0..3"}, "positive"),
        ({"speeds": [1.0, 2.0]}, "2 speeds are given for 10 workers"),
        ({"speeds": "exponential("}, "cannot read the speed law"),
        ({"stragglers": "two"}, "2x10"),
        ({"stragglers": "11x2"}, "11 of 10 workers"),
        ({"latency_s": float("inf")}, "latency_s.*finite"),
        ({"bandwidth": 0.0}, "bandwidth.*greater than or equal"),
        ({"outages": [Outage(worker=10, from_s=1.0)]}, "no worker 10"),
        ({"outages": [Outage(worker=1, from_s=3.0, to_s=2.0)]}, "empty"),
        ({"on_outage": "loose"}, "on_outage.*'pause', 'lose' or 'reassign'"),
    ],
)
def test_mistakes_are_one_sentence(options, said):
    with pytest.raises(ConfigError, match=said) as caught:
        Fleet(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("law", ["markov(20.0, fast_s=3.0, slow_s=3.0)", "periodic(3.0, 10.0)"])
def test_clocks_are_functions_of_the_start(law):
    """Asked in any order, as cancelled jobs make happen, they answer the same."""
    one, other = parse(law).clock(2, 1), parse(law).clock(2, 1)
    starts = [0.0, 50.0, 3.2, 7.7, 3.3, 120.0]
    asked = [one.finish(1, 0, start) for start in starts]
    assert asked[::-1] == [other.finish(1, 0, start) for start in starts[::-1]]
    ordered = sorted(zip(starts, asked, strict=True))
    assert all(a[1] <= b[1] for a, b in pairwise(ordered))


def test_stragglers_are_slower_whatever_the_law():
    for law in ("uniform(1.0)", "normal(1.0)", "lognormal(0.5)", "poisson(3.0)"):
        fleet = Fleet(workers=2, speeds=law, stragglers="1x10")
        clock, plain = fleet.law().clock(2, 0, fleet.factors()), fleet.law().clock(2, 0)
        for number in range(5):
            assert clock.finish(0, number, 0.0) == plain.finish(0, number, 0.0)
            assert clock.finish(1, number, 0.0) == 10 * plain.finish(1, number, 0.0)


def test_cancelled_jobs_do_not_pile_up():
    task = quadratic(3, workers=4)
    method = offbeat.algorithms.server.ringmaster(threshold=3, stop_stale=True)
    from offbeat.runtime.server import virtual

    made = []
    init = virtual.VirtualWorkers.__init__
    virtual.VirtualWorkers.__init__ = lambda self, *a: (init(self, *a), made.append(self))[0]
    try:
        fleet = Fleet(workers=4, speeds=[1.0, 1.0, 1.0, 1e7])
        result = offbeat.run(task, method, fleet, stop={"steps": 3000})
    finally:
        virtual.VirtualWorkers.__init__ = init
    assert result.facts["cancelled"] > 500
    assert len(made[0]._heap) < 200


def test_time_that_stands_still_is_noticed(monkeypatch):
    from offbeat.runtime.run import loop

    monkeypatch.setattr(loop, "MOST_AT_ONCE", 5000)
    with pytest.raises(ConfigError, match="virtual time stands still at 0 s"):
        offbeat.run("quadratic(3)", "pure", "4 poisson(1e-12)", stop={"seconds": 5})
