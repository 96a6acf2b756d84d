"""Nodes of one process, as several threads speak to them."""

import sys
import threading
import time

import numpy as np
import pytest
from canonical import METHODS, N, canonical
from simulated import experiment
from threaded import Threaded, Threads

import offbeat
from offbeat.runtime.hosted import Hosted, Parcel

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


class Bringing(Threaded):
    """Counts the gradients that a thread which brings mail computes before it brings more."""

    computed = ()

    def _bring(self, seat):
        mine = threading.current_thread()
        while (parcels := seat.mail.get()) is not None:
            before = LONG.by.count(mine)
            seat.hosted.bring(parcels)
            self.computed = (*self.computed, LONG.by.count(mine) - before)


class Long:
    """A task whose gradients take a while; ``by`` are the threads that computed them."""

    spec = None
    workers, dim = N, NOISY.dim

    def __init__(self):
        self.by = []

    def initial(self, seed):
        return NOISY.initial(seed)

    def evaluate(self, x):
        return NOISY.evaluate(x)

    def gradient(self, x, worker, draw):
        time.sleep(0.02)
        self.by.append(threading.current_thread())
        return NOISY.gradient(x, worker, draw)


LONG = Long()


def test_who_brings_mail_is_not_kept_for_several_jobs():
    """What is told and asked meanwhile waits behind it."""
    engine = Threads(2, kind=Bringing)
    run("dsgd(lr=0.03)", engine, f"{N} real", "complete", LONG, pace=1.0)
    assert max(engine.loop.computed) == 1


# -- The end ---------------------------------------------------------------------------------------


def alone(carry):
    return Hosted(experiment(NOISY, METHODS["dsgd"], "ring"), [0], carry)


def test_nothing_is_handled_or_sent_after_the_end():
    sent, begun = [], threading.Event()
    ours = alone(lambda parcels: (sent.append(parcels), begun.set()))
    ours.begin(0.0, 2)
    assert begun.wait(10.0)
    mail = [Parcel(0, 1, 0, 0, "mail", 0, (NOISY.initial(0),))]
    with ours._turns:  # while it sleeps
        ours._put("end")
        ours.deliver(mail)
    ours.end(10.0)
    ours.bring(mail)
    assert not ours._thread.is_alive()
    assert ours.nodes[0].mail == {}
    assert len(sent) == 1


def test_what_never_began_can_end():
    ours = alone(lambda parcels: None)
    ours.end(1.0)
    assert not ours._thread.is_alive()
