"""Gossip on Ray actors: the same runs as without them where nobody dies, and sound ones where."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from canonical import METHODS, N, canonical

import offbeat
from offbeat.algorithms.gossip import ad_psgd, dsgt
from offbeat.runtime.base.errors import ComputeError, ConfigError
from offbeat.runtime.experiment.engines import ENGINES
from offbeat.runtime.on_ray.gossip import GossipActor, RayGossip
from offbeat.runtime.on_ray.start import start

pytestmark = pytest.mark.xdist_group("ray")  # one Ray for all
NOISY = canonical(noise=0.1)
APACE = {"ad-psgd": ad_psgd(lr=0.03)} | {n: m for n, m in METHODS.items() if m.asynchronous}


ACTORS = []  # that are there, for tests that do not kill them


@pytest.fixture(scope="module", autouse=True)
def ray():
    """One Ray, which runs find and leave as it is."""
    session = start()
    yield
    ACTORS.clear()
    session.stop()


class Borrowing(RayGossip):
    """Takes actors that are there already, and leaves them."""

    def _fill(self, seat, **more):
        if not ACTORS:
            super()._fill(seat, **more)
            return
        seat.actor = ACTORS.pop()
        parts = self._ray.get(self._parts), seat.nodes, self._device
        seat.actor.__ray_call__.remote(lambda host: host._hosted.end())
        seat.ready = seat.actor.__ray_call__.remote(GossipActor.__init__, *parts, **more)

    def close(self):
        for seat in self._seats:
            if seat.actor is not None and seat.ready is None:
                ACTORS.append(seat.actor)
                seat.actor = None
        super().close()


class Borrowed:
    """``ray``, with the actors of earlier runs."""

    def __init__(self, workers_per_actor=N // 2):
        self.made = ENGINES["ray"](workers_per_actor)
        self.spec, self.clocks, self.backend = self.made.spec, self.made.clocks, self.made.backend

    def gossip(self, experiment, records, **around):
        if not experiment.real:
            return None
        return Borrowing(experiment, self.made, records, **around)


def run(method, engine=None, topology="ring", fleet=f"{N} 1..3", steps=20, task=NOISY, **more):
    more = {"stop": {"steps": steps}, "evaluate": {"steps": 10}, "seed": 0, **more}
    engine = Borrowed() if engine is None else engine
    return offbeat.run(task, method, fleet, topology, engine=engine, **more)


def replayed(result, folder):
    task, method = result.experiment.task, result.experiment.algorithm
    again = offbeat.replay(folder, task=task, algorithm=method)
    np.testing.assert_array_equal(again.x, result.x)


# -- Conformance -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["synchronous", "asynchronous"])
def test_under_the_virtual_clock_it_is_the_same_to_the_bit(mode):
    for method in (METHODS["motef"], METHODS["motef-vr"]):
        ours, whole = (
            run(method, engine, mode=mode, clock="virtual") for engine in (Borrowed(), "virtual")
        )
        np.testing.assert_array_equal(ours.x, whole.x)
        np.testing.assert_array_equal(ours.trace, whole.trace)


@pytest.mark.parametrize("name", METHODS)
def test_every_synchronous_method_is_the_virtual_run_however_long_it_takes(name, tmp_path):
    graph = "base" if METHODS[name].varying else "ring"
    for topology in {"ring", graph}:
        folder = tmp_path / topology
        ours = run(METHODS[name], topology=topology, pace=1e-3, folder=folder)
        whole = run(METHODS[name], "virtual", topology)
        np.testing.assert_allclose(ours.x, whole.x, rtol=0, atol=1e-12)
        for key in ("loss", "consensus", "step", "gradients"):
            np.testing.assert_allclose(ours.column(key), whole.column(key), atol=1e-12)
        for key in ("messages", "bytes"):
            assert ours.facts[key] == whole.facts[key]
        replayed(ours, folder)


@pytest.mark.parametrize("name", APACE)
def test_every_asynchronous_method_converges_and_is_replayed(name, tmp_path):
    result = run(APACE[name], mode="asynchronous", pace=1e-3, steps=60, folder=tmp_path / "run")
    assert result.reason == "steps"
    losses = result.column("loss")
    assert losses[-1] < losses[0] / 2
    replayed(result, tmp_path / "run")


def test_a_straggler_slows_synchronous_nodes_only():
    """Real seconds: rounds of 20 ms, and of 100 ms at one node of four."""
    task, fleet = offbeat.workers.tasks.quadratic(5, workers=4), "4 0.02 stragglers=1x5"
    together, apart = (
        run("dsgd(lr=0.01)", Borrowed(2), fleet=fleet, task=task, mode=mode, stop={"seconds": 2.0})
        for mode in ("synchronous", "asynchronous")
    )
    paces = [np.bincount(r.trace[:, 1].astype(int)) / r.final["time_s"] for r in (together, apart)]
    assert paces[0].max() < 11  # the straggler's 10 a second
    assert paces[1][3] < 11
    assert paces[1][:3].min() > 2 * paces[1][3]


def test_large_models_travel_through_the_store():
    task = offbeat.workers.tasks.quadratic(30_000, workers=4, noise=0.1)
    more = {"task": task, "fleet": "4", "steps": 6}
    ours = run("dsgd(lr=0.1)", Borrowed(2), pace=1e-3, **more)
    whole = run("dsgd(lr=0.1)", "virtual", **more)
    np.testing.assert_allclose(ours.x, whole.x, rtol=0, atol=1e-12)


# -- Faults ----------------------------------------------------------------------------------------


class Killing(RayGossip):
    """Kills the process of one actor after another, at given steps."""

    def __init__(self, *args, kills, **more):
        super().__init__(*args, **more)
        self._kills, self.killed = list(kills), []

    def _evaluate(self):
        super()._evaluate()
        there = all(seat.ready is None for seat in self._seats)
        if there and self._kills and self.step >= self._kills[0][0]:
            _, at = self._kills.pop(0)
            actor = self._seats[at].actor
            pid = self._ray.get(actor.__ray_call__.remote(lambda self: os.getpid()))
            os.kill(pid, signal.SIGKILL)
            self.killed.append(pid)

    def _lose(self, seat, why):
        super()._lose(seat, why)
        self._extend(max(self._rounds.values()) + 30)  # the others go on, but not to the end

    def _came(self, seat):
        super()._came(seat)
        self._go()


class Deadly:
    """``ray`` that kills."""

    def __init__(self, kills, workers_per_actor=2, **more):
        self.made = ENGINES["ray"](workers_per_actor, **more)
        self.spec, self.clocks, self.backend = self.made.spec, self.made.clocks, self.made.backend
        self.kills = kills

    def gossip(self, experiment, records, **around):
        self.loop = Killing(experiment, self.made, records, kills=self.kills, **around)
        return self.loop


@pytest.mark.parametrize("mode", ["synchronous", "asynchronous"])
def test_an_actor_that_is_killed_joins_again(mode, tmp_path):
    task, method = canonical(), dsgt(lr=0.05)
    engine = Deadly([(20, 1), (60, 2)])
    result = run(
        method, engine, "random-regular", f"{N} 0.01", 450, task, mode=mode,
        evaluate={"steps": 100}, folder=tmp_path / "run",
        record={"save_every_s": 1e6},  # to save would let go those whom Killing holds back
    )  # fmt: skip
    assert len(set(engine.loop.killed)) == 2
    told = [event["event"] for event in result.events]
    assert told.count("gone") == told.count("back") == 4
    assert result.facts["restarts"] == 2
    assert result.facts["joined"] == 4
    assert result.facts["links_closed"] > 0
    # No bias is left of those that died: 0.4 where what they had moved is not given back.
    assert result.final["grad_norm"] < 5e-3
    if mode == "synchronous":
        replayed(result, tmp_path / "run")


def test_several_actors_that_start_again_have_more_time(monkeypatch):
    """Each takes its share of the machine's time from the others."""
    monkeypatch.setattr("offbeat.runtime.on_ray.gossip.START_S", 0.0)
    engine = Deadly([(20, 1), (20, 2)])
    result = run(dsgt(lr=0.05), engine, "random-regular", f"{N} 0.01", 80, canonical())
    assert len(set(engine.loop.killed)) == result.facts["restarts"] == 2
    assert [event["event"] for event in result.events].count("back") == 4


class DyingAsked(RayGossip):
    """Kills an actor when it is asked for its state."""

    killed = 0

    def _ask(self, what):
        if what == "state" and self.step >= 10 and not self.killed:
            type(self).killed += 1
            self._ray.kill(self._seats[1].actor)
        return super()._ask(what)


@pytest.mark.parametrize("mode", ["synchronous", "asynchronous"])
def test_an_actor_dies_while_a_checkpoint_is_taken(mode, tmp_path, monkeypatch):
    monkeypatch.setattr(DyingAsked, "killed", 0)
    engine = Deadly([])
    engine.gossip = lambda e, records, **around: DyingAsked(e, engine.made, records, **around)
    result = run(
        dsgt(lr=0.05), engine, "random-regular", f"{N} 0.01", 100, canonical(), mode=mode,
        record={"save_every_s": 0.3}, folder=tmp_path / "run",
    )  # fmt: skip
    assert DyingAsked.killed == result.facts["restarts"] == 1
    assert result.reason == "steps"
    assert offbeat.resume(tmp_path / "run", task=canonical()).final["step"] >= 100


def test_what_cannot_go_on_says_so():
    with pytest.raises(ComputeError, match="cannot go on without it here; resume"):
        run(METHODS["cedas"], Deadly([(2, 0)], N // 2), fleet=f"{N} 0.01", steps=200)
    with pytest.raises(ComputeError, match="all nodes are gone"):
        run(METHODS["dsgd"], Deadly([(2, 0)], N), fleet=f"{N} 0.01", steps=200)
    with pytest.raises(ComputeError, match="was replaced 0 times already"):
        run(METHODS["dsgd"], Deadly([(2, 0)], 4, restarts=0), fleet=f"{N} 0.01", steps=200)
    outage = offbeat.Fleet(
        workers=N, outages=[offbeat.Outage(worker=0, from_s=1.0, to_s=2.0)], on_outage="lose"
    )
    with pytest.raises(ConfigError, match="is for virtual time"):
        run(METHODS["dsgd"], fleet=outage)


SCRIPT = """
import offbeat
offbeat.run("quadratic(5, noise=0.1)", "{method}", "4 0.02", "ring", mode="{mode}", seed=1,
            stop={{"steps": 150}}, evaluate={{"steps": 50}}, engine="ray(2)",
            record={{"save_every_s": 0.3}}, folder={folder!r})
"""


@pytest.mark.parametrize(
    ("method", "mode"),
    [pytest.param("motef", "synchronous", marks=pytest.mark.soak), ("dsgd", "asynchronous")],
)
def test_a_driver_that_is_killed_is_resumed(method, mode, tmp_path):
    folder = tmp_path / "run"
    script = SCRIPT.format(method=method, mode=mode, folder=str(folder))
    driver = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    until_s = time.monotonic() + 120
    try:
        while len(list(folder.glob("checkpoint/*.safetensors"))) < 2:  # one of the middle
            assert time.monotonic() < until_s
            assert driver.poll() is None
            time.sleep(0.05)
    finally:
        driver.kill()
        driver.wait()
    result = offbeat.resume(folder)
    assert (np.diff(result.trace[:, 0]) >= 0).all()
    if mode == "asynchronous":
        np.testing.assert_array_equal(result.trace[:, 4], np.arange(len(result.trace)))
    assert result.reason == "steps"
    assert result.final["step"] >= 150
    assert result.final["loss"] < 0.05
    if mode == "synchronous":
        whole = offbeat.run(
            "quadratic(5, noise=0.1)", method, "4 0.02", "ring", seed=1, stop={"steps": 150}
        )
        np.testing.assert_allclose(result.x, whole.x, rtol=0, atol=1e-12)
    again = offbeat.replay(folder)
    np.testing.assert_array_equal(again.x, result.x)
