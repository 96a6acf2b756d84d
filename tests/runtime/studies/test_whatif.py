"""Traces in, answers out."""

import json
import math

import pytest
from cells import Scored

import offbeat
from offbeat.algorithms.server.method import Finisher, Method, Schedule, StepSize
from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.report.whatif import predict
from offbeat.runtime.run.records import column
from offbeat.workers.fleet import Fleet
from offbeat.workers.speeds import recorded_times

FLEET = "8 lognormal(0.8, 1..4)"
LEVEL = 0.4


def record(folder, method, seed, fleet=FLEET, **more):
    return offbeat.run(
        "logistic:digits", method, fleet, stop={"steps": 2500}, evaluate={"steps": 10}, seed=seed,
        folder=folder, **more,
    )  # fmt: skip


@pytest.mark.parametrize("method", ["pure(lr=0.05)", "ringmaster(lr=0.05)"])
def test_a_trace_predicts_a_run_that_it_was_not_made_of(tmp_path, method):
    """Another seed, so other durations of the same law; also with another method than recorded."""
    record(tmp_path / "recorded", "pure(lr=0.05)", 1)
    record(tmp_path / "other", method, 7)
    _, _, found = predict(tmp_path / "recorded", [method], target={"loss": LEVEL})
    _, truth, _ = predict(tmp_path / "other", target={"loss": LEVEL}, seeds=1)
    assert found[-1].middle == pytest.approx(truth, rel=0.15)


def test_more_workers_are_predicted(tmp_path):
    record(tmp_path / "recorded", "pure(lr=0.05)", 1)
    _, recorded, found = predict(
        tmp_path / "recorded", workers=["+8", "-4"], target={"loss": LEVEL}
    )
    assert [one.workers for one in found] == [8, 16, 4]
    assert found[1].middle < 0.75 * recorded < 1.25 * recorded < found[2].middle


def test_graphs_are_predicted_with_their_messages(tmp_path):
    offbeat.run(
        "least-squares(5)", "dsgt(lr=0.01)", "8 lognormal(0.5) latency_s=1.0", "ring",
        stop={"steps": 400}, folder=tmp_path / "a",
    )  # fmt: skip
    _, recorded, found = predict(tmp_path / "a", topologies=["complete"], target={"loss": 0.01})
    assert [one.name.endswith(", complete") for one in found] == [False, True]
    assert found[0].middle == pytest.approx(recorded, rel=0.15)
    assert found[1].middle < math.inf


def test_a_fleet_comes_from_a_run_or_a_table(tmp_path):
    result = record(tmp_path / "recorded", "pure(lr=0.05)", 1)
    fleet = Fleet.parse(f"trace:{tmp_path / 'recorded'}")
    assert fleet.workers == 8
    again = offbeat.run(
        "logistic:digits",
        "pure(lr=0.05)",
        fleet,
        stop={"steps": 2500},
        evaluate={"steps": 10},
        seed=1,
    )
    # Recorded times are differences of seconds: the same to rounding.
    # What was under way at the end was not recorded.
    ends = [column(trace, "end_s")[:2400] for trace in (again.trace, result.trace)]
    assert ends[0] == pytest.approx(ends[1])
    path, times = tmp_path / "recorded" / "trace.jsonl", recorded_times(tmp_path / "recorded", 8)
    path.write_text("\n".join(map(json.dumps, result.trace.tolist())))  # as peers write: 1.0
    assert recorded_times(path, 8) == times
    path = tmp_path / "times.csv"
    path.write_text("worker,start_s,end_s\n0,10,11.5\n1,10,13\n0,11.5,14\n")
    assert recorded_times(path, 2) == [[1.5, 2.5], [3.0]]
    assert Fleet.parse(f"trace:{path}").workers == 2
    path.write_text("worker,start_s,end_s\n0,10\n1,1,2,3\n")
    with pytest.raises(ConfigError, match=r'line 2: "0,10" has 2 columns, and line 1 has 3'):
        recorded_times(path, 2)


@pytest.mark.parametrize("work", ["{}", "compressed(topk(0.5), {})"])
def test_times_of_local_steps_are_of_one_step(work, tmp_path):
    offbeat.run(
        "quadratic(3)", "async-local-sgd", "3 1..3", stop={"steps": 30}, folder=tmp_path / "a",
        work=work.format("local-steps(sgd(0.1), steps=5)"),
    )  # fmt: skip
    assert recorded_times(tmp_path / "a", 3)[2] == pytest.approx([3.0] * 5, abs=1e-9)


@pytest.mark.parametrize("text", ['algorithm = "pure"', 'work = "gradient"', "[[algorithm]]"])
def test_only_a_runs_own_file_says_how_many_steps_its_jobs_have(text, tmp_path):
    offbeat.run("quadratic(3)", "pure", "3 1..3", stop={"steps": 30}, folder=tmp_path / "a")
    (tmp_path / "a" / "experiment.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"experiment\.toml: .* written by the run"):
        recorded_times(tmp_path / "a", 3)


def test_a_target_that_rises_is_predicted(tmp_path):
    record(tmp_path / "a", "pure(lr=0.05)", 1)
    goal, recorded, found = predict(tmp_path / "a", ["shuffled(lr=0.5)"], target={"accuracy": 0.8})
    assert (goal.metric, goal.level) == ("accuracy", 0.8)
    again = offbeat.resume(tmp_path / "a")
    assert recorded == pytest.approx(again.time_to("accuracy", 0.8))
    assert found[0].middle == pytest.approx(recorded, rel=0.5)
    assert found[1].middle < math.inf
    with pytest.raises(ConfigError, match=r"did not reach accuracy 1\.5; its best is 0\.9"):
        predict(tmp_path / "a", target={"accuracy": 1.5})
    with pytest.raises(ConfigError, match='has no metric "distance2"'):
        predict(tmp_path / "a", target={"distance2": 1.5})


def test_what_was_made_in_python_is_predicted_where_it_can_be_made(tmp_path):
    task = Scored({"auc": "higher"})
    made = Method(Schedule(Finisher()), [StepSize(0.05)])
    for name, (of, by) in {
        "task": (task, "pure(lr=0.05)"),
        "method": ("quadratic(3)", made),
    }.items():
        offbeat.run(of, by, "4 1..4", stop={"steps": 100}, folder=tmp_path / name)
    with pytest.raises(
        ConfigError, match=r"python:Scored, was made in Python .*predict\(folder, task="
    ):
        predict(tmp_path / "task")
    _, recorded, found = predict(tmp_path / "task", ["shuffled(lr=0.05)"], task=task)
    assert [one.recorded for one in found] == [True, False]
    assert found[0].middle == pytest.approx(recorded, rel=0.3)
    with pytest.raises(ConfigError, match="its method was made in Python; name others"):
        predict(tmp_path / "method")
    _, _, found = predict(tmp_path / "method", ["pure(lr=0.05)", made], target={"loss": 0.05})
    assert [one.name for one in found] == ["pure(lr=0.05)", "Method"]
    assert found[0].seconds == found[1].seconds  # the same method, said otherwise


def test_a_file_that_was_edited_is_not_taken_for_the_run(tmp_path):
    record(tmp_path / "a", "pure(lr=0.05)", 1)
    file = tmp_path / "a" / "experiment.toml"
    file.write_text(file.read_text().replace("lr = 0.05", "lr = 0.5"))
    with pytest.raises(
        ConfigError, match=r"not that of the run: algorithm\.lr is 0\.5, and was 0\.05"
    ):
        predict(tmp_path / "a", seeds=1)
    with pytest.raises(ConfigError, match=r"algorithm\.lr is"):
        predict(tmp_path / "a", task="logistic:iris", seeds=1)


def test_mistakes_are_told(tmp_path):
    record(tmp_path / "a", "pure(lr=0.05)", 1, record={"trace": False})
    with pytest.raises(ConfigError, match="has no trace"):
        predict(tmp_path / "a")
    offbeat.run("quadratic(3)", "pure", stop={"steps": 50}, folder=tmp_path / "b")
    with pytest.raises(ConfigError, match="did not reach loss -1"):
        predict(tmp_path / "b", target={"loss": -1.0})
    with pytest.raises(ConfigError, match=r"write 16, \+2 or -1"):
        predict(tmp_path / "b", workers=["two"])
    with pytest.raises(ConfigError, match="leaves none"):
        predict(tmp_path / "b", workers=["-10"])
