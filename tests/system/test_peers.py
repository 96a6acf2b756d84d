"""Gossip among real processes: the virtual run, whoever is killed, stopped or not let in."""

import json
import resource
import signal
from unittest.mock import Mock

import deploying
import numpy as np
import psutil
import pytest
from peering import LIMIT_S, MOTEF, SUSPECT_S, Ring, free_port, keyring, made, sound, table
from processes import Told, metrics, start, wait_for
from typer.testing import CliRunner

import offbeat
from offbeat.runtime.api import api
from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.commands.cli import app
from offbeat.runtime.gossip.replayed import Replayed, read_inputs
from offbeat.runtime.protocol.wire import PIECE_BYTES
from offbeat.runtime.run.records import Records
from offbeat.runtime.transport import keys


def virtual(of):
    return offbeat.run(**of)


@pytest.mark.parametrize(
    ("algorithm", "topology"), [(MOTEF, "ring"), ("dsgt(lr=0.05)", "matching")]
)
def test_peers_end_where_the_virtual_run_does(tmp_path, algorithm, topology):
    of = table(40, algorithm, topology)
    with Ring(of, tmp_path) as ring:
        assert ring.start().join() == [0] * 4
    x = np.mean([ring.state(i)["x"] for i in range(4)], axis=0)
    np.testing.assert_allclose(x, virtual(of).x, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(api.replay(tmp_path).x, x)
    rows = (tmp_path / "n2" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["step"] == 40


def test_peers_with_keys_and_one_whose_key_nobody_knows(tmp_path):
    of = table(20)
    with Ring(of, tmp_path) as ring:
        folder = tmp_path / "keys"
        keyring(folder, ring.names)
        keys.new(folder / "stranger", "n3")
        for name in ring.names[:3]:
            keys.authorize(folder / "stranger", name, keys.show(folder / name, name))
        for i in range(3):
            ring.start(i, keys_folder=folder / f"n{i}")
        ring.start(3, keys_folder=folder / "stranger")
        ring.processes[3].join(LIMIT_S)
        assert ring.processes[3].exitcode == 4
        assert "does not let n3 in" in ring.error(3)
        ring.start(3, keys_folder=folder / "n3")
        assert ring.join() == [0] * 4
    x = np.mean([ring.state(i)["x"] for i in range(4)], axis=0)
    np.testing.assert_allclose(x, virtual(of).x, rtol=0, atol=1e-12)


@pytest.mark.soak
def test_a_peer_whose_key_is_revoked_is_mixed_around_until_it_is_listed_again(tmp_path):
    with Ring(table(100_000, seconds=0.02), tmp_path) as ring:
        folder = tmp_path / "keys"
        keyring(folder, ring.names)
        for i, name in enumerate(ring.names):
            ring.start(i, keys_folder=folder / name)
        rows = [tmp_path / name / "metrics.jsonl" for name in ring.names]
        ring.await_(lambda: all(path.exists() and path.stat().st_size for path in rows))
        for i in (0, 2):
            (folder / f"n{i}" / keys.AUTHORIZED / "n1.key").unlink()
        ring.await_(lambda: all(ring.events(i, "down") for i in (0, 2)))
        for i in (0, 2):
            keys.authorize(folder / f"n{i}", "n1", keys.show(folder / "n1", "n1"))
        ring.await_(lambda: all(ring.events(i, "up") for i in (0, 2)))
        for i in range(4):
            ring.signal(i, signal.SIGTERM)
        assert ring.join() == [0] * 4


def test_kill_9_of_a_peer_and_its_return(tmp_path):
    steps = 300
    with Ring(table(steps, seconds=0.02), tmp_path) as ring:
        ring.start()
        ring.await_(lambda: ring.round(1) > 20)
        ring.signal(1, signal.SIGKILL)
        assert ring.processes[1].exitcode == -signal.SIGKILL
        ring.await_(lambda: all(ring.events(i, "down") for i in (0, 2)))
        before = ring.round(3)
        ring.await_(lambda: ring.round(3) > before + 10)  # the others go on
        ring.start(1)
        assert ring.join() == [0] * 4
        assert json.loads((tmp_path / "n1" / "peer.json").read_text())["incarnation"] == 2
        assert all(ring.events(i, "up") for i in (0, 2))
        sound(ring, steps)
    with pytest.raises(ConfigError, match="n1: was stopped or started again"):
        api.replay(tmp_path)


def test_a_peer_that_comes_back_after_the_run_learns_what_came_of_it(tmp_path):
    with Ring(table(60, seconds=0.02), tmp_path) as ring:
        ring.start()
        ring.await_(lambda: ring.round(1) > 10)
        ring.signal(1, signal.SIGKILL)
        ring.await_(lambda: all(ring.ask(i)["state"] == "done" for i in (0, 2)))
        ring.start(1)
        assert ring.join() == [0] * 4
        said = json.loads((tmp_path / "n1" / "summary.json").read_text())
        assert (said["reason"], said["round"]) == ("steps", 60)
        distances = [np.linalg.norm(ring.state(1)["x"] - ring.state(i)["x"]) for i in (0, 2, 3)]
        assert max(distances) < 0.5 * np.linalg.norm(ring.state(0)["x"])


def test_a_peer_that_is_stopped_is_mixed_around_and_comes_back(tmp_path):
    steps = 200
    with Ring(table(steps, seconds=0.02), tmp_path) as ring:
        ring.start()
        ring.await_(lambda: ring.round(1) > 20)
        ring.signal(1, signal.SIGSTOP)
        stopped = psutil.Process(ring.processes[1].pid)
        ring.await_(lambda: stopped.status() == psutil.STATUS_STOPPED)
        ring.await_(lambda: all(ring.events(i, "down") for i in (0, 2)))
        ring.signal(1, signal.SIGCONT)
        assert ring.join() == [0] * 4
        assert all(ring.events(i, "up") for i in (0, 2))
        sound(ring, steps)


def test_a_full_disk_of_one_peer_is_borne_until_there_is_room_again(tmp_path):
    """A limit on file size stands in for it; not a line of the trace is lost."""
    with Ring(table(100_000, seconds=0.02, record={"save_every_s": 0.2}), tmp_path) as ring:
        ring.start()
        ring.await_(lambda: ring.saved(1) and ring.round(1) > 20)
        trace, pid = tmp_path / "n1" / "trace.jsonl", ring.processes[1].pid
        full = trace.stat().st_size + 5_000
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (full, hard))
        ring.await_(lambda: trace.stat().st_size == full)
        kept = ring.state(1)["step"]
        ring.await_(lambda: ring.round(1) > kept + 50)  # it goes on, and so do its neighbours
        assert ring.state(1)["step"] <= kept + 20
        assert not ring.events(0, "down")
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))
        ring.await_(lambda: ring.state(1)["step"] > kept + 50)
        for i in range(4):
            ring.signal(i, signal.SIGTERM)
        assert ring.join() == [0] * 4
    rows = [json.loads(line) for line in trace.read_text().splitlines()]
    jobs = [row[2] for row in rows[1:] if isinstance(row, list)]
    assert jobs == list(range(len(jobs)))


def test_who_is_down_again_and_again_leaves_no_connections(tmp_path):
    with Ring(table(100_000, seconds=0.02), tmp_path) as ring:
        ring.start()
        ring.await_(lambda: min(ring.round(i) for i in range(4)) > 10)

        def connections(i):
            return len(psutil.Process(ring.processes[i].pid).net_connections("tcp"))

        before = [connections(i) for i in range(4)]
        for times in (1, 2):
            ring.signal(1, signal.SIGSTOP)
            ring.await_(lambda: all(len(ring.events(i, "down")) >= times for i in (0, 2)))  # noqa: B023
            ring.signal(1, signal.SIGCONT)
            ring.await_(lambda: all(len(ring.events(i, "up")) >= times for i in (0, 2)))  # noqa: B023
        ring.await_(lambda: [connections(i) for i in range(4)] == before)
        assert all(process.is_alive() for process in ring.processes.values())


def test_all_leave_when_asked_and_go_on_from_their_checkpoints(tmp_path):
    steps = 120
    with Ring(table(steps, seconds=0.02), tmp_path) as ring:
        ring.start()
        ring.await_(lambda: min(ring.round(i) for i in range(4)) > 10)
        for i in range(4):
            ring.signal(i, signal.SIGTERM)
        assert ring.join() == [0] * 4
        assert all(10 < ring.state(i)["step"] < steps for i in range(4))
        assert ring.start().join() == [0] * 4
        sound(ring, steps)


def test_another_experiment_is_refused_with_its_difference(tmp_path):
    of = {**table(20, "dsgd(lr=0.1)"), "fleet": "2 0.002"}
    with Ring(of, tmp_path, n=2) as ring:
        ring.start(0)
        ring.start(1, table={**of, "algorithm": "dsgd(lr=0.2)"})
        assert ring.join() == [2, 2]
        assert "here algorithm.lr = 0.1; there algorithm.lr = 0.2" in ring.error(0)
        assert "here algorithm.lr = 0.2; there algorithm.lr = 0.1" in ring.error(1)


def test_peers_have_to_agree_when_silence_is_suspect(tmp_path):
    with Ring({**table(20), "fleet": "2 0.002"}, tmp_path, n=2) as ring:
        ring.start(0)
        ring.start(1, suspect_after_s=3 * SUSPECT_S)
        assert ring.join() == [2, 2]
        assert "here suspect_after_s = 0.4; there suspect_after_s = 1.2" in ring.error(0)


@pytest.mark.parametrize(
    ("engine", "options", "taken"),
    [
        ("", [], 1.0),
        ('engine = {name = "zmq", suspect_after_s = 3.0}', [], 3.0),
        ('engine = {name = "zmq", suspect_after_s = 3.0}', ["--suspect-after-s", "2"], 2.0),
    ],
)
def test_a_peer_takes_its_times_from_the_experiment(engine, options, taken, tmp_path, monkeypatch):
    monkeypatch.setattr("offbeat.runtime.on_zeromq.peer.PeerProcess", seen := Mock())
    file, hosts = tmp_path / "run.toml", tmp_path / "hosts.toml"
    file.write_text(f"{engine}\n{deploying.PEERS}")
    hosts.write_text('[[hosts]]\nname = "a"\naddress = "127.0.0.1"\nslots = 3\n')
    words = ["peer", str(file), "--hosts", str(hosts), "--node", "a-0", *options]
    CliRunner().invoke(app, words, catch_exceptions=False)
    assert seen.call_args.kwargs["suspect_after_s"] == taken


def test_offbeat_run_watches_peers_of_its_own_and_goes_on_where_it_was(tmp_path):
    of, longer = table(40), table(60)
    here, there = virtual(of), offbeat.run(**of, engine="zmq", folder=tmp_path / "run")
    np.testing.assert_allclose(there.x, here.x, rtol=0, atol=1e-12)
    for row, other in zip(here.metrics, there.metrics, strict=True):
        assert (row["step"], row["gradients"]) == (other["step"], other["gradients"])
        for key in ("loss", "consensus"):
            assert row[key] == pytest.approx(other[key], abs=1e-12)
    assert there.facts["bytes"] == here.facts["bytes"]
    assert not [
        p
        for p in psutil.Process().children(recursive=True)
        if "offbeat.runtime.on_zeromq.local" in p.cmdline()
    ]
    more = api.resume(tmp_path / "run", overrides=["stop.steps=60"])
    np.testing.assert_allclose(more.x, virtual(longer).x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dim", [200_000, pytest.param(600_000, marks=pytest.mark.soak)])
def test_models_of_several_pieces(tmp_path, dim):
    of = table(4, "dsgd(lr=0.1)", task=f"quadratic({dim}, workers=4)", evaluate={"steps": 4})
    there = offbeat.run(**of, engine="zmq", folder=tmp_path / "run")
    here = virtual(of)
    np.testing.assert_allclose(there.x, here.x, rtol=0, atol=1e-12)
    assert there.facts["bytes"] == here.facts["bytes"] > 4 * PIECE_BYTES


def test_what_asynchronous_peers_did_is_replayed_from_their_traces(tmp_path):
    of = table(30, mode="asynchronous")
    with Ring(of, tmp_path) as ring:
        assert ring.start().join() == [0] * 4
        inputs = {}
        for i, name in enumerate(ring.names):
            length = ring.state(i)["records"]["lengths"]["trace.jsonl"]
            inputs |= read_inputs(tmp_path / name / "trace.jsonl", length)
        again = Replayed(
            made(of), inputs, Records(made(of).fleet, None),
            stop=made(of).stop, evaluate=made(of).evaluate,
        )  # fmt: skip
        again.run()
        for i in range(4):
            np.testing.assert_array_equal(again.nodes[i].model, ring.state(i)["x"])
    np.testing.assert_array_equal(api.replay(tmp_path).x, api.recorded(tmp_path))
    with pytest.raises(ConfigError, match=r"is the folder of one peer.*put the folders of all"):
        api.replay(tmp_path / "n2")
    (tmp_path / "n2").rename(tmp_path.parent / f"{tmp_path.name}-n2")
    with pytest.raises(ConfigError, match="has the folders of 3 of 4 peers"):
        api.replay(tmp_path)


def test_an_asynchronous_run_is_replayed_to_the_bit(tmp_path):
    of = table(40, mode="asynchronous")
    live = offbeat.run(**of, engine="zmq", folder=tmp_path / "run")
    np.testing.assert_array_equal(api.replay(tmp_path / "run").x, live.x)
    assert live.facts["messages"] > 40


EXPERIMENT = """
task = "quadratic(20, noise=0.1)"
algorithm = "dsgd(lr=0.1)"
topology = "ring"
fleet = "3 0.02"
[stop]
steps = 100000
[evaluate]
steps = 10
[record]
save_every_s = 0.2
"""


def test_logs_and_metrics_of_peers(tmp_path):
    (tmp_path / "run.toml").write_text(EXPERIMENT)
    hosts = "".join(
        f'[[hosts]]\nname = "{name}"\naddress = "127.0.0.1"\nport = {free_port()}\n'
        for name in "abc"
    )
    (tmp_path / "hosts.toml").write_text(hosts)
    words = ["peer", str(tmp_path / "run.toml"), "--hosts", str(tmp_path / "hosts.toml")]
    told = {
        name: Told(
            start(*words, "--node", name, "--out", str(tmp_path / name), "--log", "json",
                  "--metrics", "0")
        )
        for name in "abc"
    }  # fmt: skip
    try:
        one = told["a"]
        begun = one.until("begins")
        assert (begun["how"], begun["node"], begun["incarnation"]) == ("start", "a", 1)
        assert begun["neighbours"] == ["b", "c"]
        one.until("saved")
        endpoint = one.of("metrics")[0]["endpoint"]
        wait_for(lambda: metrics(endpoint)["offbeat_round"][()] > 10, one.process)
        found = metrics(endpoint)
        assert found["offbeat_neighbours_up"][()] == 2
        assert found["offbeat_neighbour_round"].keys() == {("b",), ("c",)}
        assert found["offbeat_job_seconds_count"][()] >= found["offbeat_round"][()] - 1
        assert min(found["offbeat_bytes_total"].values()) > 1000
        told["b"].process.kill()
        told["b"].end(-signal.SIGKILL)
        assert one.until("down")["neighbour"] == "b"
        wait_for(lambda: metrics(endpoint)["offbeat_neighbours_up"][()] == 1, one.process)
    finally:
        for each in told.values():
            each.process.terminate()
    rows = one.end(130)
    assert [row["event"] for row in rows][-1] == "ended"
    assert told["c"].end(130)


@pytest.mark.soak
@pytest.mark.parametrize("algorithm", ["dsgd(lr=0.1)", "dsgt(lr=0.05)", MOTEF])
def test_a_watched_peer_that_is_killed_is_begun_again(algorithm):
    killed = []

    def progress(fraction):
        if fraction > 0.2 and not killed:
            leaves = [p for p in psutil.Process().children(recursive=True) if not p.children()]
            peers = [p for p in leaves if "offbeat.runtime.on_zeromq.local" in p.cmdline()]
            killed.append(peers[1].pid)
            peers[1].kill()

    result = offbeat.run(
        **table(300, algorithm, seconds=0.02), engine=f"zmq(suspect_after_s={SUSPECT_S})",
        progress=progress,
    )  # fmt: skip
    assert len(killed) == 1
    assert result.facts["joined"] == result.facts["restarts"] == 1
    assert result.final["loss"] < 0.05
