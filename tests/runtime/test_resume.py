"""Checkpoints, resuming and replaying; damage, and what must not be touched."""

import json
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from typer.testing import CliRunner

import offbeat
from offbeat import ConfigError, StorageError
from offbeat.algorithms.server import Algorithm
from offbeat.algorithms.server.method import Finisher, Method, Schedule, StepSize
from offbeat.runtime.api import api
from offbeat.runtime.api.api import load_experiment
from offbeat.runtime.base import trees
from offbeat.runtime.commands.cli import app
from offbeat.runtime.experiment import files
from offbeat.runtime.experiment.experiment import from_table
from offbeat.runtime.run import checkpoint, records
from offbeat.workers.tasks import Quadratic

RUN = {"task": "quadratic(5, noise=0.2)", "algorithm": "shuffled", "fleet": "6 lognormal(1.0)"}


@pytest.fixture
def folder(tmp_path):
    offbeat.run(**RUN, stop={"steps": 300}, folder=tmp_path / "run", record={"save_every_s": 1e-3})
    return tmp_path / "run"


def test_a_finished_run_is_only_loaded(folder):
    before = {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}
    result = offbeat.resume(folder)
    assert result.reason == "steps"
    assert result.final["step"] == 300
    assert {path.name: path.read_bytes() for path in folder.glob("*.jsonl")} == before


def test_experiment_file_is_complete(folder, tmp_path):
    experiment = load_experiment(folder)
    again = offbeat.run(
        experiment.task, experiment.algorithm, experiment.fleet, stop=experiment.stop
    )
    np.testing.assert_array_equal(again.x, offbeat.resume(folder).x)
    table = experiment.table()
    assert table["algorithm"] == {"name": "shuffled", "lr": 0.1, "wait": 1}
    assert table["task"]["noise"] == 0.2


def test_a_longer_run_goes_on(folder):
    longer = offbeat.resume(folder, overrides=["stop.steps=500"])
    whole = offbeat.run(**RUN, stop={"steps": 500})
    np.testing.assert_array_equal(longer.x, whole.x)
    np.testing.assert_array_equal(longer.trace, whole.trace)
    assert load_experiment(folder).stop.steps == 500


def test_what_came_after_the_checkpoint_is_counted(folder, caplog):
    with (folder / "trace.jsonl").open("a") as file:
        file.write('[1, 0]\n{"event": "x"}\n[2, 0]\n[3')
    with caplog.at_level("INFO", "offbeat"):
        longer = offbeat.resume(folder, overrides=["stop.steps=400"])
    assert "step 300; the 3 or more results that came after it are computed again" in caplog.text
    assert len(longer.trace) == 400


def test_saves_come_soon_at_first_and_take_a_small_share_of_the_time(monkeypatch):
    now_s = [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now_s[0])

    def waits(takes_s, every_s=30.0):
        saves = checkpoint.Attempts(1, every_s)
        for _ in range(8):
            yield saves.wait_s
            with saves.bear():
                now_s[0] += takes_s

    assert list(waits(0.01)) == [1, 2, 4, 8, 16, 30, 30, 30]
    assert list(waits(0.1)) == pytest.approx([1, 10, 20, 30, 30, 30, 30, 30])
    assert list(waits(5.0))[1:] == [30] * 7  # as often as was asked for, in the end
    assert list(waits(0.01, 1e-3))[1:] == [1e-3] * 7


def test_only_ends_can_change(folder):
    with pytest.raises(ConfigError, match="another run"):
        offbeat.resume(folder, overrides=["algorithm.lr=0.5"])


def test_a_damaged_checkpoint_is_skipped_by_name(folder):
    newest = max((folder / "checkpoint").iterdir())
    data = bytearray(newest.read_bytes())
    for damage in (data[: len(data) // 2], data[:-1] + bytes([data[-1] ^ 1]), b""):
        newest.write_bytes(damage)
        skipped = checkpoint.read(folder / "checkpoint")[1]
        assert len(skipped) == 1
        assert newest.name in skipped[0]
    result = offbeat.resume(folder)
    assert len(result.notes) == 1
    np.testing.assert_array_equal(result.x, offbeat.run(**RUN, stop={"steps": 300}).x)


def test_no_good_checkpoint_is_an_error_and_nothing_is_deleted(folder):
    files = sorted((folder / "checkpoint").iterdir())
    for path in files:
        path.write_bytes(b"torn")
    with pytest.raises(StorageError, match="no readable checkpoint"):
        offbeat.resume(folder)
    assert sorted((folder / "checkpoint").iterdir()) == files


def test_cut_records_are_noticed(folder):
    trace = folder / "trace.jsonl"
    trace.write_bytes(trace.read_bytes()[:1000])
    with pytest.raises(StorageError, match=r"trace\.jsonl: has 1000 bytes"):
        offbeat.resume(folder)


def test_a_folder_is_not_run_over(folder, tmp_path):
    with pytest.raises(ConfigError, match="is not empty"):
        offbeat.run(**RUN, folder=folder)
    with pytest.raises(ConfigError, match="no run folder"):
        offbeat.resume(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        offbeat.run(**RUN, folder=tmp_path / "file" / "run")


def test_summary_and_metrics_are_json(folder):
    summary = json.loads((folder / "summary.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert summary["step"] == 300
    assert sum(summary["histogram"]) == 300
    assert rows[0]["step"] == 0


def test_runs_made_by_hand_resume_with_their_objects(tmp_path):
    task = Quadratic(np.eye(4))
    offbeat.run(task, "pure", "4 1..4", stop={"steps": 50}, folder=tmp_path / "run")
    with pytest.raises(ConfigError, match=r'"python:Quadratic".*resume.*task='):
        offbeat.resume(tmp_path / "run")
    longer = offbeat.resume(tmp_path / "run", task=task, overrides=["stop.steps=90"])
    np.testing.assert_array_equal(
        longer.x, offbeat.run(task, "pure", "4 1..4", stop={"steps": 90}).x
    )


def edited(folder, *pairs):
    path = folder / "experiment.toml"
    text = path.read_text()
    for before, after in pairs:
        assert before in text
        text = text.replace(before, after, 1)
    path.write_text(text)


def test_objects_of_one_class_are_told_apart(tmp_path):
    """By the fields of a method, and by where a task begins."""

    class Shifted(Quadratic):
        def initial(self, seed):
            return super().initial(seed) + 1.0

    def made(lr=0.1, kind=Shifted):
        return {"task": kind(np.eye(3)), "algorithm": Method(Schedule(Finisher()), [StepSize(lr)])}

    folder = tmp_path / "run"
    offbeat.run(**made(), fleet="3 1..3", stop={"steps": 30}, folder=folder)
    for parts, told in ((made(lr=0.2), "algorithm.digest is"), (made(kind=Quadratic), "task.name")):
        with pytest.raises(ConfigError, match=told):
            offbeat.resume(folder, **parts, overrides=["stop.steps=60"])
    Shifted.initial = Quadratic.initial
    with pytest.raises(ConfigError, match=r"task.digest is"):
        offbeat.replay(folder, **made())


def test_a_changed_experiment_is_not_resumed_as_the_run(folder):
    edited(folder, ("lr = 0.1", "lr = 0.2"), ("seed = 0", "seed = 3"))
    told = r"seed is 3, and was 0; algorithm.lr is 0.2, and was 0.1; .*resume --changed"
    for go_on in (offbeat.resume, offbeat.replay):
        with pytest.raises(ConfigError, match=told):
            go_on(folder)
    offbeat.resume(folder, changed=True, overrides=["stop.steps=400"])
    assert offbeat.resume(folder).final["step"] == 400  # it is the run now
    edited(folder, ("dim = 5", "dim = 6"))
    with pytest.raises(ConfigError, match="has a model of 5 numbers, and the task one of 6"):
        offbeat.resume(folder, changed=True)


def test_a_server_goes_on_with_the_run_of_its_file_alone(tmp_path):
    table = {"task": "quadratic(5)", "algorithm": "pure", "engine": "zmq", "stop": {"steps": 9}}
    (one,) = from_table(table, ours=True)
    api.prepare(one, tmp_path / "run")
    for said, told in (
        ({"algorithm": "pure(lr=0.5)"}, "algorithm.lr is 0.5, and was 0.1"),
        ({"stop": {"steps": 99}}, "stop.steps is 99, and was 9"),
    ):
        (tmp_path / "e.toml").write_text(tomli_w.dumps(table | said))
        words = ["serve", str(tmp_path / "e.toml"), "--out", str(tmp_path / "run")]
        with pytest.raises(ConfigError, match=f"is not what the file says: {told}; give another"):
            CliRunner().invoke(app, words, catch_exceptions=False, standalone_mode=False)


def test_ends_saves_and_engines_may_be_edited(folder):
    edited(folder, ("steps = 300", "steps = 350"), ("save_every_s = 0.001", "save_every_s = 9.0"))
    edited(folder, ("[stop]", '[stop]\nmetric = "loss"'))  # as former builds have it
    assert offbeat.resume(folder).final["step"] == 350


def test_a_cut_experiment_is_refused_wherever_it_was_cut(folder):
    path = folder / "experiment.toml"
    lines = path.read_text().splitlines(keepends=True)
    for count in range(len(lines)):
        path.write_text("".join(lines[:count]))
        with pytest.raises(ConfigError, match="does not end as that of a run does"):
            offbeat.resume(folder)


@pytest.mark.parametrize("name", ["trace.jsonl", "metrics.jsonl"])
def test_a_flipped_bit_is_noticed_wherever_it_is(name, folder):
    path = folder / name
    whole = path.read_bytes()
    state = checkpoint.read(folder / "checkpoint")[0]
    for at in {*range(0, len(whole), len(whole) // 20), len(whole) - 1}:
        data = bytearray(whole)
        data[at] ^= 1 << at % 8
        path.write_bytes(data)
        keeps = records.Records(offbeat.Fleet(workers=6), folder)
        with pytest.raises(StorageError, match=rf"{name}: its first {len(whole)} bytes are not"):
            keeps.restore(state["records"])
        keeps.close()
        assert path.read_bytes() == data  # nothing was cut
    for go_on in (offbeat.resume, offbeat.replay) if name == "trace.jsonl" else (offbeat.resume,):
        with pytest.raises(StorageError, match=f"{name}: its first"):
            go_on(folder)


def test_a_digest_goes_on_where_a_run_does(tmp_path):
    """Written in pieces, cut back, and written again, a file is known by what is in it."""
    file = records.Growing(tmp_path / "a")
    file.write("one\n")
    length, digest = file.durable(), file.digest
    file.write("two\n" * 5000)
    file.close()
    again = records.Growing(tmp_path / "a")
    again.check(length, digest)
    again.cut(length)
    again.write("three\n")
    assert records.checked(tmp_path / "a", again.durable(), again.digest)
    assert (tmp_path / "a").read_text() == "one\nthree\n"
    again.close()


def test_records_without_a_checkpoint_are_not_deleted(folder):
    before = {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}
    (folder / "checkpoint").rename(folder / "elsewhere")
    with pytest.raises(StorageError, match=r"no checkpoint .* but metrics.jsonl and trace.jsonl"):
        offbeat.resume(folder)
    assert {path.name: path.read_bytes() for path in folder.glob("*.jsonl")} == before
    for name in before:
        (folder / name).unlink()
    assert offbeat.resume(folder).final["step"] == 300  # begun again, as was asked for


def test_a_run_is_known_by_what_is_in_its_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", X=np.eye(8), y=[0, 1] * 4)
    Path("edges.txt").write_text("0 1\n1 2\n2 3\n")
    run = {"task": "logistic(a.npz, batch=2)", "algorithm": "dsgd", "fleet": "4 1.0"}
    run["topology"] = "dropout(of='file(edges.txt)', p=0.1)"
    whole = offbeat.run(**run, stop={"steps": 9}, folder="run")
    for name, text in (("edges.txt", b"0 1\n1 2\n1 3\n"), ("a.npz", None)):
        before = Path(name).read_bytes()
        np.savez("b.npz", X=np.eye(8) * 2, y=[0, 1] * 4)
        Path(name).write_bytes(text or Path("b.npz").read_bytes())
        for go_on in (offbeat.resume, offbeat.replay):
            with pytest.raises(ConfigError, match=rf"{name}.* has other contents than when"):
                go_on("run")
        Path(name).write_bytes(before)
    np.testing.assert_array_equal(offbeat.resume("run").x, whole.x)
    Path("a.npz").write_bytes(Path("b.npz").read_bytes())
    assert offbeat.resume("run", changed=True, overrides=["stop.steps=12"]).final["step"] == 12
    assert offbeat.resume("run").final["step"] == 12
    # Elsewhere it is the same.
    Path("c.npz").write_bytes(Path("b.npz").read_bytes())
    Path("a.npz").unlink()
    edited(Path("run"), ("a.npz", "c.npz"))
    assert offbeat.resume("run", overrides=["stop.steps=14"]).final["step"] == 14


def test_what_a_torch_file_imports_is_part_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parts").mkdir()
    Path("mine.py").write_text("def make():\n    from helper import made\n    return made()\n")
    Path("helper.py").write_text("import json\nfrom parts import size\n")
    Path("parts/__init__.py").write_text("")
    Path("parts/size.py").write_text("SIZE = 3\n")
    Path("other.py").write_text("")
    table = {"task": "torch:mine.py"}
    ((text, reads),) = files.named(table).items()
    names = ["helper.py", "mine.py", "parts/__init__.py", "parts/size.py"]
    assert sorted(map(str, reads.found(text))) == [str(tmp_path / name) for name in names]
    before = files.contents(table)
    Path("other.py").write_text("# nobody's")
    assert files.contents(table) == before
    Path("parts/size.py").write_text("SIZE = 4\n")
    assert files.contents(table) != before


def test_replay_needs_a_trace(tmp_path):
    offbeat.run(**RUN, stop={"steps": 10}, folder=tmp_path / "r", record={"trace": False})
    assert not (tmp_path / "r" / "trace.jsonl").exists()
    with pytest.raises(ConfigError, match="has no trace"):
        offbeat.replay(tmp_path / "r")


def test_trees_round_trip():
    class Thing:
        def __init__(self):
            self.a, self.b, self.c = 1, [np.arange(3), None], {3: np.float64(0.5), "k": [True]}

    class Holder:
        def __init__(self):
            self.things, self.name = [Thing(), Thing()], "x"

    one, other = Holder(), Holder()
    one.things[1].a, one.things[0].b[0], one.name = 7, np.zeros((2, 2), np.float32), "y"
    trees.load(other, trees.dump(one))
    assert other.name == "y"
    assert other.things[1].a == 7
    assert other.things[0].b[0].dtype == np.float32
    assert other.things[0].c == {3: 0.5, "k": [True]}
    one.things[0].c = {1, 2}
    with pytest.raises(ConfigError, match=r"algorithm\.things\.c holds a set, which cannot"):
        trees.dump(one)


def test_checkpoints_round_trip_and_only_the_last_are_kept(tmp_path):
    for number in range(5):
        state = {"n": number, "deep": [{"a": np.arange(number)}, float("inf"), None]}
        checkpoint.write(tmp_path, number, state)
    assert len(list(tmp_path.iterdir())) == checkpoint.KEPT
    state, skipped = checkpoint.read(tmp_path)
    assert not skipped
    assert state["n"] == 4
    np.testing.assert_array_equal(state["deep"][0]["a"], np.arange(4))
    assert state["deep"][1:] == [float("inf"), None]


def test_an_array_that_is_there_twice_is_kept_once(tmp_path):
    x, y = np.arange(1000.0), np.arange(1000.0)
    checkpoint.write(tmp_path, 0, {"x": x, "jobs": [{"x": x}, {"x": y}]})
    assert 2 * x.nbytes < next(tmp_path.iterdir()).stat().st_size < 3 * x.nbytes
    state, _ = checkpoint.read(tmp_path)
    assert state["x"] is state["jobs"][0]["x"] is not state["jobs"][1]["x"]
    np.testing.assert_array_equal(state["jobs"][1]["x"], state["x"])


def test_a_run_does_not_go_back(folder):
    with pytest.raises(ConfigError, match="is behind the run, which has reached step 300"):
        offbeat.resume(folder, overrides="stop.steps=5")
    with pytest.raises(ConfigError, match="another run"):
        offbeat.resume(folder, overrides=["record.trace=false"])
    assert load_experiment(folder).stop.steps == 300


def test_the_way_to_the_data_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", X=np.eye(8), y=[0, 1] * 4)
    offbeat.run("logistic(a.npz, batch=2)", "pure", "4 1.0", stop={"steps": 9}, folder="run")
    monkeypatch.chdir("/")
    assert offbeat.resume(tmp_path / "run").final["step"] == 9


def test_a_model_that_is_not_finite_at_the_end_is_no_success(tmp_path):
    with pytest.raises(offbeat.Diverged, match="not finite at step 3"):
        offbeat.run(
            "quadratic", "pure(lr=1e308)", stop={"steps": 3}, evaluate={}, folder=tmp_path / "r"
        )
    assert np.isfinite(checkpoint.read(tmp_path / "r" / "checkpoint")[0]["x"]).all()


def crafted(arrays, data, tree='{"a": 1}', length=None):
    """A checkpoint's bytes, whatever its header says."""
    said = {"__metadata__": {"format": checkpoint.FORMAT, "state": tree, "digest": "0"}, **arrays}
    header = json.dumps(said).encode()
    return struct.pack("<Q", length or len(header)) + header + data


def declared(shape, start, end, dtype="F64"):
    return {"000000": {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}}


def nested(depth):
    """A tree whose digest is right, and which no reader could descend."""
    tree = "[" * depth + "]" * depth
    metadata = {"format": checkpoint.FORMAT, "state": tree, "digest": checkpoint._digest(tree, {})}
    header = json.dumps({"__metadata__": metadata}).encode()
    return struct.pack("<Q", len(header)) + header


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('code was run')",)


CRAFTED = {
    "an array of 10 GB": crafted(declared([1_250_000_000], 0, 10_000_000_000), b"x" * 64),
    "a header of 10 GB": crafted({}, b"x" * 64, length=10_000_000_000),
    "a shape beyond its bytes": crafted(declared([1_250_000_000], 0, 64), b"x" * 64),
    "a shape that overflows": crafted(declared([2**40, 2**40], 0, 64), b"x" * 64),
    "arrays that overlap": crafted(
        declared([8], 0, 64) | {"000001": {"dtype": "F64", "shape": [8], "data_offsets": [8, 72]}},
        b"x" * 72,
    ),
    "offsets that go back": crafted(declared([8], 64, 0), b"x" * 64),
    "a pickle": pickle.dumps(Bomb()),
    "a tree of a million levels": nested(10**6),
    "no tree": crafted({}, b"", tree="["),
}
READ = """
import resource, sys
from pathlib import Path
from offbeat.runtime.run import checkpoint
from offbeat.runtime.base.errors import StorageError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))
for folder in sorted(Path(sys.argv[1]).iterdir()):
    try:
        checkpoint.read(folder)
    except StorageError as error:
        assert "no readable checkpoint" in str(error)
        print("refused", folder.name)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_crafted_checkpoint_is_refused_before_memory_is_taken(tmp_path):
    for name, data in CRAFTED.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "000000000001.safetensors").write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *refused, grown_kb = done.stdout.splitlines()
    assert refused == [f"refused {name}" for name in sorted(CRAFTED)]
    assert int(grown_kb) < 50_000  # the largest file has 2 MB


def test_what_a_full_disk_does_not_take_waits_up_to_a_limit(monkeypatch):
    """A device that is always full."""
    monkeypatch.setattr(records, "MOST_HELD", 3 * records.HELD_BYTES)
    file = records.Growing(Path("/dev/full"))
    file.write("x" * 2 * records.HELD_BYTES)
    with pytest.raises(StorageError, match="No space left on device"):
        file.durable()
    with pytest.raises(StorageError, match="the last checkpoint is intact"):
        file.write("x" * records.HELD_BYTES)
    file.close()


def test_a_method_may_count_with_numpys_integers(tmp_path):
    class Counting(Algorithm):
        any_shard = True

        def arrive(self, server, update):
            server.apply(0.1 * update.payload)
            shard = server.rng("shard", server.step).integers(server.shards)
            server.assign(update.worker, steps=np.int64(3), shard=shard)

    parts = "quadratic(5)", Counting(), "3 1..3"
    options = {"work": "local-steps(sgd, steps=2)", "stop": {"steps": 30}}
    result = offbeat.run(*parts, **options, folder=tmp_path / "run")
    np.testing.assert_array_equal(result.x, offbeat.run(*parts, **options).x)


@pytest.mark.parametrize("law", ["trace('times.csv')", "trace(recorded)", "trace:recorded"])
def test_a_run_goes_on_from_anywhere(law, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    (here / "times.csv").write_text("0,1\n1,2\n")
    (here / "a.txt").write_text("words and words " * 100)
    offbeat.run("quadratic(3)", "pure", "2 1..2", stop={"steps": 9}, folder="recorded")
    fleet = offbeat.Fleet(workers=2, speeds=law)
    for name, data in (("a", "text:a.txt"), ("b", "text:*.txt"), ("c", "*.txt")):
        task = f"lm('{data}', length=8, batch=1, evaluated=1)"
        monkeypatch.chdir(here)
        offbeat.run(task, "pure", fleet, stop={"steps": 2}, folder=tmp_path / name)
        monkeypatch.chdir(tmp_path)
        again = offbeat.resume(tmp_path / name, overrides=["stop.steps=3"])
        assert again.final["step"] == 3


def test_a_file_that_cannot_be_written_whole_is_what_it_was(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    checkpoint.write_whole(path, b"before")

    def full(number):
        assert path.read_bytes() == b"before"  # whoever kills the process now
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write_whole(path, b"after")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("state.json", b"before")]
