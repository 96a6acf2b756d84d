"""Nodes of one process, as several threads speak to them."""

import sys

import numpy as np
import pytest
from canonical import METHODS, N, canonical
from threaded import Threaded, Threads

import offbeat

NOISY = canonical(noise=0.1)


@pytest.fixture
def often():
    """Threads take turns wherever they can."""
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before_s)


def run(method, engine, fleet=f"{N} 1..3", topology="ring", task=NOISY, **more):
    more = {"stop": {"steps": 20}, "evaluate": {"steps": 10}, "seed": 0, "pace": 1e-3, **more}
    return offbeat.run(task, method, fleet, topology, engine=engine, **more)


@pytest.mark.parametrize("name", METHODS)
def test_however_threads_take_turns_it_is_the_virtual_run(name, often):
    whole = run(METHODS[name], "virtual", pace=1.0)
    for actors in (2, N):
        ours = run(METHODS[name], Threads(actors))
        np.testing.assert_allclose(ours.x, whole.x, rtol=0, atol=1e-12)
        for key in ("messages", "bytes"):
            assert ours.facts[key] == whole.facts[key]


class Resting(Threaded):
    """Counts nodes that have something under way when all are said to rest."""

    rested = busy = 0

    def _rest(self):
        super()._rest()
        self.rested += 1
        nodes = [node for seat in self._seats for node in seat.hosted.nodes.values()]
        self.busy += sum(not node.quiet for node in nodes)


def test_who_rested_before_others_offered_an_exchange_rests_again(tmp_path):
    """One node rests; the other is done later, and turns to it: the answer is on its way."""
    engine = Threads(2, watch_s=1.0, kind=Resting)
    task = offbeat.workers.tasks.quadratic(5, workers=2, noise=0.1)
    fleet = offbeat.Fleet(workers=2, speeds=[0.03, 0.3], latency_s=0.05)
    result = run(
        "dsgd(lr=0.1)", engine, fleet, "complete", task, mode="asynchronous", pace=1.0,
        stop={"seconds": 0.65}, folder=tmp_path / "run",
    )  # fmt: skip
    assert engine.loop.rested == 2
    assert engine.loop.busy == 0
    again = offbeat.replay(tmp_path / "run", task=task)
    np.testing.assert_array_equal(again.x, result.x)
