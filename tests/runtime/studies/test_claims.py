"""What the benchmark of the studies calls a claim that holds: each can fail, and does."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
import studies

GRAPHS = ("ring", "path")


def topology(slopes, lost=()):
    """Rows of rounds = gap ** slope; below the gaps ``lost`` nobody gets there."""
    gaps = [0.5, 0.2, 0.08, 0.04, 0.02, 0.01, 0.005]
    return [
        {
            "algorithm": f"{method}(gamma=1)",
            "topology": "ring",
            "gap": gap,
            "steps_to_target": None if gap in lost else 10 * gap**slope,
        }
        for method, slope in slopes.items()
        for gap in gaps
    ]


def verdicts(claims):
    return {claim.said.split(":")[0]: claim.holds for claim in claims}


def test_exponents_of_the_gap():
    as_claimed = {"dsgd": -1.0, "dsgt": -0.9, "choco": -1.6, "beer": -1.0, "motef": -0.2}
    otherwise = {"dsgd": -0.5, "dsgt": -1.4, "choco": -0.8, "beer": -1.5, "motef": -1.0}
    assert set(verdicts(studies.topology(topology(as_claimed))).values()) == {True}
    assert set(verdicts(studies.topology(topology(otherwise))).values()) == {False}
    few = topology(as_claimed, lost=(0.08, 0.04, 0.02, 0.01))  # no three gaps are left for a fit
    assert set(verdicts(studies.topology(few)).values()) == {False}


def test_what_got_there_among_what_did_not_is_in_no_fit():
    """0.005 is reached by luck, quickly; 0.01 is not."""
    rows = topology({"dsgd": -1.0}, lost=(0.01,))
    rows[-1]["steps_to_target"] = 11.0
    (claim,) = studies.topology(rows)
    assert claim.holds
    assert "1 of 7 not reached, the largest gap of them 0.01" in claim.found


def test_a_line_through_a_cloud_shows_nothing():
    rows = topology({"dsgd": -1.0, "motef": 0.0})
    for at, row in enumerate(rows):
        row["steps_to_target"] *= 30 ** (at % 2)
    assert set(verdicts(studies.topology(rows)).values()) == {False}


@pytest.mark.parametrize(
    ("sync", "asyn", "word", "holds"),
    [
        (100.0, 10.0, "10.0", True),
        (10.0, 20.0, "0.5", False),
        (None, 10.0, "only asynchronous", True),
        (10.0, None, "only synchronous", False),
        (None, None, "neither", False),
    ],
)
def test_who_waits_for_a_straggler(sync, asyn, word, holds):
    rows = [
        {"algorithm": "dsgt", "topology": graph, "mode": mode, "seconds_to_target": seconds}
        for graph in GRAPHS
        for mode, seconds in (("synchronous", sync), ("asynchronous", asyn))
    ]
    (claim,) = studies.straggler(rows)
    assert claim.holds == holds
    assert f"ring {word}" in claim.found


def test_the_order_of_assignments():
    def rows(pure, random, shuffled, minibatch):
        floors = dict(pure=pure, random=random, shuffled=shuffled, minibatch=minibatch)
        return [
            {"algorithm": name, "fleet.speeds": law, "floor": floor}
            for name, floor in floors.items()
            for law in ("1..10", "uniform(1..10)")
        ]

    assert [claim.holds for claim in studies.asgrad(rows(0.4, 0.18, 0.1, 0.09))] == [True] * 4
    assert [claim.holds for claim in studies.asgrad(rows(0.2, 0.25, 0.1, 0.11))] == [False] * 4
    assert not studies.asgrad(rows(None, 0.2, 0.1, 0.1))[1].holds


def test_local_steps():
    def rows(vanilla, delayed, dylu, spans):
        floors = {"diloco": 1.0, "async": vanilla, "delayed": delayed, "dylu": dylu}
        seconds = {"diloco": spans[0], "async": 1.0, "delayed": 1.0, "dylu": spans[1]}
        return [
            {"algorithm": n, "fleet.speeds": p, "floor": f, "time_s": seconds[n]}
            for n, f in floors.items()
            for p in ("[1, 1]", "[1, 4]")
        ]

    held = studies.local_sgd(rows(1.05, 1.02, 1.0, (33.0, 10.0)))
    assert [claim.holds for claim in held] == [True] * 4
    broken = studies.local_sgd(rows(1.5, 1.2, 1.1, (10.0, 10.0)))
    assert [claim.holds for claim in broken] == [False] * 4


def test_bytes_of_changing_graphs():
    def rows(ring, peers, base):
        bytes_of = {"ring": ring, "one-peer-exponential": peers, "base(peers=1)": base}
        return [
            {"algorithm": "dsgd", "topology": g, "bytes_to_target": b} for g, b in bytes_of.items()
        ]

    assert [claim.holds for claim in studies.time_varying(rows(9e6, 3e6, 2e6))] == [True] * 3
    assert [claim.holds for claim in studies.time_varying(rows(1e6, 3e6, 4e6))] == [False] * 3
    assert [claim.holds for claim in studies.time_varying(rows(None, None, None))] == [False] * 3


def test_powers_of_the_step_size():
    powers = {
        "pure": 0, "random": 1, "sgd": 1, "shuffled": 2, "random-reshuffling": 2,
        "shuffle-once-sgd": 2, "minibatch": 2,
    }  # fmt: skip

    def rows(shift):
        return [
            {"algorithm": name, "algorithm.lr": lr, "floor": lr ** (power + shift)}
            for name, power in powers.items()
            for lr in (0.1, 0.05, 0.02)
        ]

    assert all(claim.holds for claim in studies.step_size(rows(0.05)))
    assert not any(claim.holds for claim in studies.step_size(rows(0.5)))
