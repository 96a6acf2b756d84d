"""Which way a metric is better decides when a target is reached, and what is best."""

import math
import sys

import numpy as np
import pytest
from cells import Scored

import offbeat
from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.commands import cli
from offbeat.runtime.experiment import metrics
from offbeat.runtime.experiment.experiment import from_table, read, with_more

DIGITS = "logistic:digits", "shuffled(lr=0.5)"


def test_a_run_ends_when_the_metric_is_there_by_its_direction():
    result = offbeat.run(*DIGITS, stop={"steps": 2000, "accuracy": 0.9}, evaluate={"steps": 20})
    assert result.reason == "target accuracy"
    accuracies = result.column("accuracy")
    assert accuracies[-1] >= 0.9 > accuracies[:-1].max()
    assert result.final["step"] > 0
    both = offbeat.run(*DIGITS, stop={"steps": 2000, "accuracy": 0.9, "loss": 1.5})
    assert both.reason == "target loss"  # the first that is met


def test_a_task_says_which_way_its_own_metrics_go():
    better = {"auc": "higher", "miss": "lower"}
    ends = {}
    for metric, level in (("auc", 0.999), ("miss", 0.001)):
        result = offbeat.run(
            Scored(better), "shuffled(lr=0.05)", stop={"steps": 500, metric: level},
            evaluate={"steps": 1},
        )  # fmt: skip
        assert result.reason == f"target {metric}"
        ends[metric] = result.final["step"]
        assert result.time_to(metric, level) <= result.final["time_s"]
    assert ends["auc"] == ends["miss"] > 1
    with pytest.raises(ConfigError, match=r'better: auc is "lower" or "higher", not .up.'):
        offbeat.run(Scored({"auc": "up"}), "pure", stop={"steps": 5, "auc": 0.9})


@pytest.mark.parametrize(
    ("stop", "said"),
    [
        ({"steps": 5, "acuracy": 0.9}, r'stop.acuracy: .*not known: its task.*mean "accuracy"'),
        ({"steps": 5, "auc": 0.9}, r'better = {"auc": "higher"}'),
        ({"steps": 5, "bytes": 9}, "stop.bytes: bytes only grows and is no target"),
        ({"steps": 5, "distance2": 0.1}, r'stop.distance2: this run has no metric "distance2"'),
        ({"steps": 5, "accuracy": "high"}, '"accuracy" should be a number, not .high.'),
        ({"steps": 5, "accuracy": math.nan}, '"accuracy" should be a finite number'),
        ({"steps": 5, "targets": {"accuracy": math.nan}}, '"targets" should be a finite number'),
        ({"steps": 5, "metric": "accuracy", "loss": 0.9}, "stop.accuracy = 0.9, and without"),
        ({"stepz": 5}, 'a target stepz may never be reached; .*did you mean "steps"'),
    ],
)
def test_what_is_no_target_is_refused_before_the_first_step(stop, said):
    with pytest.raises(ConfigError, match=said):
        offbeat.run(*DIGITS, stop=stop)


def test_a_target_is_said_alike_everywhere(tmp_path):
    """In a file, on the command line, in Python, and when a run goes on."""
    path = tmp_path / "a.toml"
    path.write_text('task = "logistic:digits"\nalgorithm = "pure"\nstop = {steps = 9}\n')
    (one,) = read(path, overrides=["stop.accuracy=0.9"])
    assert one.stop == offbeat.Stop(steps=9, accuracy=0.9) != offbeat.Stop(steps=9, accuracy=0.8)
    assert from_table(one.table())[0].stop == one.stop
    assert one.table()["stop"] == {"steps": 9, "accuracy": 0.9}
    more = with_more(one, ["stop.steps=20", "stop.loss=0.1"]).stop
    assert (more.steps, more.targets) == (20, {"accuracy": 0.9, "loss": 0.1})


def test_the_time_to_a_level():
    result = offbeat.run(*DIGITS, stop={"steps": 200}, evaluate={"steps": 10})
    accuracy, time_s = result.column("accuracy"), result.column("time_s")
    at = int(np.argmax(accuracy >= 0.8))
    assert time_s[at - 1] < result.time_to("accuracy", 0.8) <= time_s[at]
    assert result.time_to("accuracy", 0.0) == 0.0
    assert result.time_to("accuracy", 1.1) == result.time_to("loss", -1.0) == math.inf
    with pytest.raises(ConfigError, match='no metric "acuracy"; did you mean "accuracy"'):
        result.time_to("acuracy", 0.8)


def test_between_evaluations_what_falls_is_geometric_and_what_rises_linear():
    curve = {"step": [0, 10, 20], "loss": [1.0, 0.01, 0.0001], "time_s": [0.0, 5.0, 30.0]}
    found = metrics.reached(curve, "loss", 0.001, "lower")
    assert found == {"step": pytest.approx(15), "time_s": pytest.approx(17.5)}
    assert metrics.reached(curve, "loss", 2.0, "lower")["step"] == 0
    assert metrics.reached(curve, "loss", 1e-9, "lower") == {}
    rises = {"step": [0, 10, 20], "accuracy": [0.1, 0.5, 0.9]}
    assert metrics.reached(rises, "accuracy", 0.7, "higher") == {"step": pytest.approx(15)}
    assert metrics.reached(rises, "accuracy", 0.95, "higher") == {}
    unknown = {"step": [0, 10, 20], "loss": [None, None, 0.1]}
    assert metrics.reached(unknown, "loss", 0.5, "lower") == {"step": 20}


@pytest.mark.parametrize(
    ("command", "text", "said"),
    [
        ("run", 'experiment.task = "quadratic(3)"', "is a study; begin it with: offbeat study"),
        ("study", 'task = "quadratic(3)"', "is an experiment; begin it with: offbeat run"),
    ],
)
def test_a_file_of_the_other_kind_is_one_sentence(
    command, text, said, tmp_path, monkeypatch, capsys
):
    (tmp_path / "a.toml").write_text(text)
    monkeypatch.setattr(sys, "argv", ["offbeat", command, str(tmp_path / "a.toml")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    told = capsys.readouterr().err
    assert end.value.code == 2
    assert f"{said} {tmp_path / 'a.toml'}" in told
    assert told.count("\n") == 1
