"""Nodes of one process, as several threads speak to them."""

import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from canonical import METHODS, N, canonical
from simulated import experiment
from threaded import Threaded, Threads

import offbeat
from offbeat.runtime.base.errors import ComputeError
from offbeat.runtime.gossip.hosted import Envelope, NodeLoop
from offbeat.runtime.node.node import HELLO
from offbeat.runtime.node.synchronous import MAIL

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


# -- Nodes that are to rest ------------------------------------------------------------------------


class Slow(Long):
    """A task whose gradients take longer than a process may be silent."""

    def gradient(self, x, worker, draw):
        time.sleep(0.3)
        return NOISY.gradient(x, worker, draw)


def test_a_checkpoint_waits_for_as_long_as_a_job_takes(monkeypatch, tmp_path):
    monkeypatch.setattr("offbeat.runtime.gossip.driver.SILENT_S", 0.2)
    engine = Threads(N, watch_s=0.02, kind=Resting)
    run(
        "dsgd(lr=0.03)", engine, f"{N} real", task=Slow(), pace=1.0, stop={"steps": 3},
        folder=tmp_path / "run", record={"save_every_s": 0.1},
    )  # fmt: skip
    assert engine.loop.rested > 2
    assert engine.loop.busy == 0


class Mute(Threaded):
    """Node 3 says nothing any more, though it is there."""

    def _take(self, seat, told):
        if seat.nodes != [3]:
            super()._take(seat, told)


def test_a_process_that_says_nothing_is_not_waited_for(monkeypatch):
    monkeypatch.setattr("offbeat.runtime.gossip.driver.SILENT_S", 0.2)
    with pytest.raises(ComputeError, match="node 3 did not come to rest: its process said nothing"):
        run("dsgd(lr=0.03)", Threads(N, watch_s=0.02, kind=Mute))


# -- What is lost ----------------------------------------------------------------------------------


class Pair:
    """Two nodes, each in a process of its own, at the end of their rounds; ``lose`` is asked."""

    def __init__(self, lose):
        self.lost, self.lose = [], lose
        task = canonical(n=2, noise=0.1)
        made = replace(experiment(task, METHODS["dsgt"], "complete"), pace=1e-3)
        self.ends = [NodeLoop(made, [i], self.carry) for i in range(2)]
        for end in self.ends:
            end.begin(0.0, 3)

    def carry(self, parcels):
        for parcel in parcels:
            if self.lose(parcel) and not self.lost:
                self.lost.append(parcel)
            else:
                self.ends[parcel.to].deliver([parcel])

    def until(self, condition):
        end_s = time.monotonic() + 10.0
        while not all(condition(end, i) for i, end in enumerate(self.ends)):
            assert time.monotonic() < end_s, "it did not happen in time"
            time.sleep(0.01)

    def end(self):
        for end in self.ends:
            end.end(10.0)


def rests(end, i):
    return end.report(0.0).rests


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr("offbeat.runtime.gossip.hosted.AGAIN_S", 0.2)
    monkeypatch.setattr("offbeat.runtime.gossip.hosted.MOST_WAIT_S", 0.05)


@pytest.mark.parametrize("far", [1, 2])
def test_a_greeting_that_was_lost_is_said_again_by_who_is_done(soon, far):
    """Else one end would have given back what the other has not, for as long as both rest."""
    pair = Pair(lambda parcel: parcel.kind == HELLO and parcel.items[0][2] == far)
    pair.until(rests)
    pair.ends[0].tell("down", 1)
    pair.ends[0].tell("up", 1)
    pair.until(lambda end, i: end.nodes[i].counts["opened"])
    pair.end()
    assert len(pair.lost) == 1


def test_the_last_mail_that_was_lost_is_sent_again_by_who_is_done(soon):
    pair = Pair(lambda parcel: parcel.kind == MAIL and parcel.number == 2)
    pair.until(rests)
    pair.end()
    assert len(pair.lost) == 1
    assert [end.nodes[i].round for i, end in enumerate(pair.ends)] == [3, 3]


# -- The end ---------------------------------------------------------------------------------------


def alone(carry):
    return NodeLoop(experiment(NOISY, METHODS["dsgd"], "ring"), [0], carry)


def test_nothing_is_handled_or_sent_after_the_end():
    sent, begun = [], threading.Event()
    ours = alone(lambda parcels: (sent.append(parcels), begun.set()))
    ours.begin(0.0, 2)
    assert begun.wait(10.0)
    mail = [Envelope(0, 1, 0, 0, "mail", 0, (NOISY.initial(0),))]
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
