"""Gossip runs as users have them: folders, resuming, replaying, the command line."""

import json
import tomllib

import networkx as nx
import numpy as np
import pytest
from canonical import METHODS
from typer.testing import CliRunner

import offbeat
from offbeat.algorithms.gossip import ALGORITHMS
from offbeat.runtime.api import api
from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.commands.cli import app
from offbeat.topologies import from_networkx
from offbeat.workers.fleet import Outage

FLEETS = {
    "plain": "6 lognormal(0.5)",
    "rough": "6 lognormal(0.5) loss=0.2 latency_s=0.1 jitter_s=0.05 bandwidth=10000.0",
}
SPECS = {name: str(method.spec) for name, method in METHODS.items()}
SPECS["ad-psgd"] = "ad-psgd"
CASES = [
    (name, mode, fleet)
    for name, text in SPECS.items()
    for method in [ALGORITHMS.parse(text)]
    for mode in ("synchronous", "asynchronous")
    for fleet in FLEETS
    if getattr(method, mode) and (method.varying or fleet != "rough")
]


def run(name, mode, fleet, steps, **more):
    return offbeat.run(
        "quadratic(5, noise=0.2)", SPECS[name], FLEETS[fleet], "ring", mode=mode,
        stop={"steps": steps}, evaluate={"steps": 7}, **more,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "mode", "fleet"), CASES)
def test_resume_and_replay_to_the_bit(name, mode, fleet, tmp_path):
    whole = run(name, mode, fleet, 40, folder=tmp_path / "whole")
    again = run(name, mode, fleet, 40)
    np.testing.assert_array_equal(whole.x, again.x)
    assert whole.metrics == again.metrics
    run(name, mode, fleet, 17, folder=tmp_path / "cut")
    resumed = offbeat.resume(tmp_path / "cut", overrides=["stop.steps=40"])
    np.testing.assert_array_equal(resumed.x, whole.x)
    for file in ("metrics.jsonl", "trace.jsonl"):
        one, other = ((tmp_path / part / file).read_text() for part in ("whole", "cut"))
        assert one == other
    np.testing.assert_array_equal(offbeat.replay(tmp_path / "cut").x, whole.x)
    assert whole.metrics[-1]["loss"] < whole.metrics[0]["loss"]


def test_a_folder_is_enough(tmp_path):
    run("motef", "asynchronous", "rough", 10, folder=tmp_path / "run")
    table = tomllib.loads((tmp_path / "run" / "experiment.toml").read_text())
    assert table["mode"] == "asynchronous"
    assert table["topology"] == {"name": "ring", "n": 6, "weights": "metropolis"}
    assert table["algorithm"]["compressor"] == "qsgd(8)"
    experiment = api.load_experiment(tmp_path / "run")
    np.testing.assert_array_equal(
        api.execute(experiment).x, api.checkpointed(tmp_path / "run")["x"]
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["messages_lost"] > 0
    assert len(summary["edges"]) == 12


def test_outages_resume_to_the_bit(tmp_path):
    fleet = offbeat.Fleet(
        workers=6, speeds="lognormal(0.5)", on_outage="lose",
        outages=[Outage(worker=1, from_s=3.5, to_s=20.0), Outage(worker=4, from_s=12.0)],
    )  # fmt: skip
    more = {"task": "quadratic(5)", "algorithm": "motef(compressor='topk(2)')", "topology": "ring"}
    for mode in ("synchronous", "asynchronous"):
        whole = offbeat.run(**more, fleet=fleet, mode=mode, stop={"steps": 40})
        cut = tmp_path / mode
        offbeat.run(**more, fleet=fleet, mode=mode, stop={"steps": 9}, folder=cut)
        resumed = offbeat.resume(cut, overrides=["stop.steps=40"])
        np.testing.assert_array_equal(resumed.x, whole.x)
        np.testing.assert_array_equal(offbeat.replay(cut).x, whole.x)


@pytest.mark.parametrize("mode", ["synchronous", "asynchronous"])
def test_messages_under_way_when_a_node_leaves_are_resumed(mode, tmp_path):
    """Who is away depends on when messages come, of which a checkpoint knows the bytes."""
    away = [Outage(worker=1, from_s=t, to_s=t + 3.0) for t in range(10, 150, 7)]
    fleet = offbeat.Fleet(
        workers=6, speeds="lognormal(0.5)", bandwidth=20.0, on_outage="lose", outages=away
    )
    more = {"task": "quadratic(5)", "algorithm": "dsgt", "topology": "ring", "mode": mode}
    whole = offbeat.run(**more, fleet=fleet, stop={"steps": 20})
    for steps in range(1, 20, 2):
        cut = tmp_path / str(steps)
        offbeat.run(**more, fleet=fleet, stop={"steps": steps}, folder=cut)
        resumed = offbeat.resume(cut, overrides=["stop.steps=20"])
        np.testing.assert_array_equal(resumed.x, whole.x)
        assert resumed.final == whole.final


def cli(*words):
    return CliRunner().invoke(app, list(words))


def test_the_command_line_compares_graphs_and_modes(tmp_path):
    done = cli(
        "run", "--task", "quadratic(3)", "--algorithm", "dsgd", "--algorithm", "choco",
        "--topology", "ring:6", "--topology", "complete:6", "--mode", "synchronous",
        "--mode", "asynchronous", "--steps", "20", "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    labels = (tmp_path / "out" / "runs.txt").read_text().splitlines()
    assert len(labels) == 8
    assert labels[0] == "dsgd ring synchronous"
    assert labels[-1] == "choco complete asynchronous"
    assert (tmp_path / "out" / "picture.png").stat().st_size > 10_000
    for word in ("rounds", "MB sent", "consensus"):
        assert word in done.output


def test_the_graph_says_how_many_nodes_there_are():
    (experiment,) = api_from("dsgd", "ring:6")
    assert experiment.fleet.workers == 6
    with pytest.raises(ConfigError, match="6 nodes, but the fleet has 4 workers"):
        api_from("dsgd", "ring:6", {"workers": 4})
    assert api_from("dsgd", "ring", "6 lognormal(0.5)")[0].topology.n == 6


def api_from(algorithm, topology, fleet=None):
    from offbeat.runtime.experiment.experiment import from_table

    table = {"task": "quadratic", "algorithm": algorithm, "topology": topology}
    return from_table(table | ({"fleet": fleet} if fleet else {}))


@pytest.mark.parametrize("mode", ["synchronous", "asynchronous"])
def test_time_that_stands_still_is_noticed(mode, monkeypatch):
    from offbeat.runtime.run import loop

    monkeypatch.setattr(loop, "MOST_AT_ONCE", 500)
    with pytest.raises(ConfigError, match="virtual time stands still at 0 s"):
        offbeat.run(
            "quadratic(3)", "dsgd", "4 poisson(1e-12)", "ring", mode=mode, stop={"seconds": 5}
        )


def test_marks_closer_than_time_can_tell_are_passed():
    ends = {"stop": {"steps": 5}, "evaluate": {"seconds": 1e-300}}
    result = offbeat.run("quadratic(3)", "dsgd", "4", "ring", **ends)
    assert len(result.metrics) == 6


def test_a_run_on_a_graph_from_a_file_goes_on_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "graph.txt").write_text("0 1\n1 2\n2 0\n")
    monkeypatch.chdir(tmp_path)
    more = {"fleet": "3", "topology": "file('graph.txt')", "stop": {"steps": 5}}
    offbeat.run("quadratic(3)", "dsgd", **more, folder="run")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert offbeat.resume(tmp_path / "run", overrides=["stop.steps=9"]).final["step"] == 9


def test_gradients_alone_say_how_often_to_evaluate():
    """A round of eight nodes is eight gradients."""
    result = offbeat.run("quadratic(5)", "dsgd", "8", "ring", stop={"gradients": 8000})
    assert result.final["gradients"] == 8000
    assert 100 <= len(result.metrics) <= 102


def test_a_graph_of_networkx_and_a_matrix_are_topologies():
    """The same run, whichever way its ring is given."""
    ring = nx.cycle_graph(6)
    given = ("ring:6", ring, from_networkx(ring).matrix().toarray())
    results = [
        offbeat.run("least-squares", "dsgd", "6", topology=one, stop={"steps": 20}) for one in given
    ]
    for result in results:
        assert result.experiment.topology.n == 6
        np.testing.assert_array_equal(result.x, results[0].x)


@pytest.mark.parametrize(
    ("written", "here"),
    [("gradient-tracking", "dsgt"), ("push_sum", "gradient-push"), ("FedAvg", "local-sgd")],
)
def test_a_name_of_the_literature_finds_its_method(written, here):
    with pytest.raises(ConfigError, match=f'"{written}"; did you mean "{here}"'):
        ALGORITHMS.parse(written)
    assert here in ALGORITHMS
