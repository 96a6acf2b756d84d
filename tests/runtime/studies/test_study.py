"""Studies: every cell once, whatever happens in between; the table says what came of each."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas
import pytest
from cells import work

from offbeat.runtime.api import api
from offbeat.runtime.base.errors import ConfigError, StorageError
from offbeat.runtime.commands import cli
from offbeat.runtime.report import report
from offbeat.runtime.studies import cell, judge, lines, pool, study, table
from offbeat.runtime.studies.study import Study

SMALL = {
    "seeds": 2,
    "experiment": {
        "task": "quadratic(3)",
        "fleet": {"workers": 4, "speeds": "1..4"},
        "stop": {"steps": 60},
    },
    "grid": {"algorithm": ["pure", "shuffled"], "fleet.workers": [4, 6]},
}


def small(**more):
    return Study(json.loads(json.dumps({**SMALL, **more})))


# -- What is run ------------------------------------------------------------------------------


def test_a_grid_is_every_combination_and_zipped_keys_go_together():
    made = small(zip=[{"fleet.speeds": ["1..4", "1..9"], "stop.steps": [60, 30]}])
    cells, wanted = made.plan({})
    assert len(cells) == len(wanted) == 2 * 2 * 2 * 2
    assert len({one.key for one in cells}) == 16
    together = {(one.table["fleet"]["speeds"], one.table["stop"]["steps"]) for one in cells}
    assert together == {("1..4", 60), ("1..9", 30)}


def test_a_cell_is_named_by_its_complete_settings():
    """However they are written; a default that is spelled out is the same, another value is not."""
    keys = {}
    for text in ("pure", "pure(lr=0.1)", "pure(lr=0.1, wait=1)", "pure(lr=0.2)"):
        (one,), _ = Study({**SMALL, "seeds": 1, "grid": {"algorithm": [text]}}).plan({})
        keys[text] = one.key
    assert len(set(keys.values())) == 2
    assert keys["pure"] == keys["pure(lr=0.1)"] == keys["pure(lr=0.1, wait=1)"]


def test_a_cell_is_the_run_that_its_settings_describe(tmp_path):
    ((one, line), *_) = study.run(small(), tmp_path, jobs=1)
    alone = api.execute(cell.one(one.table))
    assert line["final"] == alone.final
    assert line["curve"]["loss"][-1] == float(f"{alone.final['loss']:.6g}")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"grids": {}}, 'unknown key "grids"; did you mean "grid"?'),
        ({"grid": {"algorythm": ["pure"]}}, 'unknown key "algorythm"; did you mean "algorithm"?'),
        ({"grid": {"algorithm": ["pure", "shufled"]}}, 'did you mean "shuffled"?'),
        ({"grid": {"algorithm": "pure"}}, "must be a list"),
        ({"grid": {"seed": [1]}}, "seeds = "),
        ({"zip": [{"stop.steps": [1, 2], "fleet.speeds": ["1..4"]}]}, "of one length"),
        ({"zip": [{"fleet.workers": [4, 6]}]}, "varied twice"),
        ({"tune": {"grid": {"fleet.workers": [4, 6]}}}, "varied twice"),
        ({"zip": 3}, "zip must be tables"),
        ({"zip": [{}]}, "zip must be a table of dotted keys"),
        ({"experiment": {"task": "quadratic(3)", "record": 3}}, "[record] must be a table"),
        ({"seeds": "3"}, "seeds must be"),
        ({"seeds": True}, "seeds must be"),
        ({"tune": {"grid": {"algorithm.lrate": [1.0]}}}, 'unknown key "lrate"; known: lr, wait'),
        ({"tune": {"grid": {}}}, "name a key"),
        ({"target": {"acuracy": 1.0}}, 'target: which way "acuracy" is better is not known'),
        ({"target": {"metric": "accuracy", "level": 0.9}}, "as [target] accuracy = 0.9"),
        ({"tune": {"grid": {"algorithm.lr": [1.0]}, "by": "flor"}}, 'did you mean "floor"?'),
    ],
)
def test_mistakes_are_told_before_anything_runs(more, said):
    with pytest.raises(ConfigError) as error:
        small(**more)
    assert said in str(error.value)


def test_quick_makes_a_study_small(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("""
seeds = 5
[experiment]
task = "quadratic(3)"
stop.steps = 1000
[grid]
algorithm = ["pure", "random"]
"algorithm.lr" = [0.1, 0.2]
[quick]
seeds = 1
grid.algorithm = ["pure"]
grid."algorithm.lr" = [0.3]
experiment.stop.steps = 10
""")
    assert len(Study.read(path).plan({})[0]) == 20
    ((quick,), _) = Study.read(path, quick=True).plan({})
    assert quick.table["stop"]["steps"] == 10
    assert quick.table["algorithm"]["lr"] == 0.3
    words = ["seeds=[7]", "grid.algorithm.lr=[0.5]", 'grid."fleet.workers"=[3]']
    (other,) = Study.read(path, words, quick=True).plan({})[0]
    assert (other.seed, other.table["algorithm"]["lr"]) == (7, 0.5)
    assert other.table["fleet"]["workers"] == 3


# -- Once ---------------------------------------------------------------------------------------


def test_what_is_done_is_never_run_again_and_a_grid_may_grow(tmp_path):
    study.run(small(), tmp_path)
    before = (tmp_path / lines.CELLS).read_bytes()
    study.run(small(), tmp_path)
    assert (tmp_path / lines.CELLS).read_bytes() == before
    study.run(small(seeds=3), tmp_path)
    after = (tmp_path / lines.CELLS).read_bytes()
    assert after.startswith(before)
    assert (before.count(b"\n"), after.count(b"\n")) == (8, 12)


def test_a_torn_line_is_run_again_and_a_damaged_one_is_told(tmp_path):
    study.run(small(), tmp_path)
    path = tmp_path / lines.CELLS
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    assert len(lines.read_cells(tmp_path)) == 7
    study.run(small(), tmp_path)
    assert len(lines.read_cells(tmp_path)) == path.read_bytes().count(b"\n") == 8
    path.write_bytes(whole.replace(b'{"cell"', b'{"call"', 1))
    with pytest.raises(StorageError, match="line 1: is not what was written"):
        lines.read_cells(tmp_path)


def test_a_flipped_bit_in_a_row_is_told_wherever_it_is(tmp_path):
    whole = cell.encode({"cell": "a", "final": {"loss": 0.25}, "reason": "steps"})
    assert cell.decode(whole)["final"] == {"loss": 0.25}
    for at in range(8 * (len(whole) - 1)):
        data = bytearray(whole)
        data[at // 8] ^= 1 << at % 8
        (tmp_path / lines.CELLS).write_bytes(data)
        with pytest.raises(StorageError, match="line 1: is not what was written"):
            lines.read_cells(tmp_path)


def on_data(source, scale):
    np.savez(source, X=np.eye(8) * scale, y=[0, 1] * 4)
    experiment = {"task": f"logistic({source}, batch=2)", "stop": {"steps": 20}}
    return {"seeds": 2, "experiment": experiment, "grid": {"fleet.workers": [2, 4]}}


def losses(found):
    return [line["final"]["loss"] for _, line in found]


def test_cells_are_of_what_is_in_the_files_not_of_where_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = on_data("a.npz", 1.0)
    table["experiment"]["algorithm"] = "pure"
    first = losses(study.run(Study(table), tmp_path / "s"))
    on_data("a.npz", 4.0)
    other = losses(study.run(Study(table), tmp_path / "s"))
    assert other != first
    assert other == losses(study.run(Study(table), tmp_path / "new"))
    assert len(lines.read_cells(tmp_path / "s")) == 8
    (tmp_path / "a.npz").rename(tmp_path / "b.npz")
    table["experiment"]["task"] = "logistic(b.npz, batch=2)"
    assert losses(study.run(Study(table), tmp_path / "s")) == other
    assert len(lines.read_cells(tmp_path / "s")) == 8
    (tmp_path / "b.npz").unlink()  # a page needs what was recorded, nothing else
    monkeypatch.chdir("/")
    shown = Study.read(tmp_path / "s" / study.FILE, build=False)
    missing, wanted = shown.plan(done := lines.read_cells(tmp_path / "s"))
    assert not missing
    assert losses((one, done[one.key]) for one in wanted) == other


def test_no_cell_is_of_files_that_were_replaced_in_the_midst(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = on_data("a.npz", 1.0)
    table["experiment"]["algorithm"] = "pure"
    made = Study(table)
    on_data("a.npz", 2.0)
    done = study.run(made, tmp_path / "s", jobs=1)
    assert all('a.npz" has other contents' in line["error"] for _, line in done)


def test_a_folder_has_one_study_at_a_time(tmp_path):
    first = lines.CellsFile(tmp_path)
    with pytest.raises(ConfigError, match="a study is running in it"):
        study.run(small(), tmp_path)
    first.close()
    assert len(study.run(small(), tmp_path)) == 8


def test_a_failed_cell_is_a_row_and_is_run_again_only_when_asked(tmp_path):
    made = small(grid={"algorithm": ["pure(lr=0.1)", "pure(lr=1e200)"]})
    cells = study.run(made, tmp_path)
    rows = table.rows(made, cells)
    assert [row["error"] is None for row in rows] == [True, True, False, False]
    assert "Diverged" in rows[2]["error"]
    before = (tmp_path / lines.CELLS).read_bytes()
    study.run(made, tmp_path)
    assert (tmp_path / lines.CELLS).read_bytes() == before
    study.run(made, tmp_path, retry=True)
    assert (tmp_path / lines.CELLS).read_bytes().count(b"\n") == 6


def test_a_process_that_raises_dies_or_hangs_costs_its_cell_only():
    kinds = ["fine", "raise", "fine", "die", "fine", "fine", "hang", "fine", "fine", "fine"]
    items = list(zip(kinds, range(len(kinds)), strict=True))
    found = dict(pool.processes(work, items, 2, limit_s=3.0))
    assert sorted(found) == list(range(len(kinds)))
    for index, (answer, error) in found.items():
        if kinds[index] == "fine":
            assert (answer, error) == (index**2, None)
    assert found[1] == (None, "ValueError: cannot do 1")
    assert found[3] == (None, "its process died (signal SIGKILL)")
    assert found[6] == (None, "took longer than 3 s")


def test_interrupted_and_resumed_without_running_a_finished_cell_again(tmp_path):
    """With the real signal, in a real process."""
    path, out = tmp_path / "s.toml", tmp_path / "out"
    path.write_text("""
seeds = 60
experiment.task = "quadratic(3)"
experiment.stop.steps = 3000
grid.algorithm = ["pure", "shuffled"]
""")
    words = [
        sys.executable,
        "-m",
        "offbeat.runtime.commands.cli",
        "study",
        str(path),
        "--out",
        str(out),
    ]
    first = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    cells = out / lines.CELLS
    deadline = time.monotonic() + 120
    while not cells.exists() or cells.read_bytes().count(b"\n") < 10:
        assert time.monotonic() < deadline
        assert first.poll() is None
        time.sleep(0.02)
    first.send_signal(signal.SIGINT)
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 130, said
    before = cells.read_bytes()
    assert 10 <= before.count(b"\n") < 120
    assert f"interrupted; {before.count(chr(10).encode())} runs are done" in said
    again = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    after = cells.read_bytes()
    assert after.startswith(before)
    assert after.count(b"\n") == len(lines.read_cells(out)) == 120
    rows = pandas.read_parquet(out / "results.parquet")
    assert len(rows) == 120
    assert rows["loss"].notna().all()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"target": {"accuracy": 0.1}}, 'target: runs have no metric "accuracy"'),
        ({"experiment": {**SMALL["experiment"], "stop": {"steps": 9, "perplexity": 2.0}}},
         'stop.perplexity: runs have no metric "perplexity"'),
        ({"tune": {"grid": {"algorithm.lr": [0.1]}, "by": "accuracy"}},
         'tune.by: runs have no metric "accuracy"'),
    ],
)  # fmt: skip
def test_a_metric_that_runs_do_not_have_is_told_before_the_first_cell(more, said, tmp_path):
    with pytest.raises(ConfigError) as error:
        study.run(small(**more), tmp_path, jobs=1)
    assert said in str(error.value)
    assert lines.read_cells(tmp_path) == {}


def test_a_target_that_rises_is_reached_when_it_is_there(tmp_path):
    """By hand: the first evaluation with an accuracy of 0.9, and the way there is linear."""
    made = Study(
        {
            "experiment": {
                "task": "logistic:digits", "algorithm": "shuffled(lr=0.5)",
                "stop": {"steps": 200}, "evaluate": {"steps": 10},
            },
            "grid": {"fleet.workers": [4]},
            "target": {"accuracy": 0.9},
        }
    )  # fmt: skip
    ((one, line),) = study.run(made, tmp_path, jobs=1)
    (found,) = table.rows(made, [(one, line)])
    values, steps = line["curve"]["accuracy"], line["curve"]["step"]
    at = next(at for at, value in enumerate(values) if value >= 0.9)
    part = (0.9 - values[at - 1]) / (values[at] - values[at - 1])
    assert at > 0
    assert found["steps_to_target"] == pytest.approx(steps[at - 1] + part * 10)
    assert found["floor"] == pytest.approx(np.mean(values[-5:]))  # of 21


@pytest.mark.parametrize("tune", [{}, {"by": "floor"}, {"by": "accuracy"}])
def test_tuning_takes_the_highest_of_what_rises(tune, tmp_path):
    """A small step is the best after a few of them; nobody reaches the target."""
    made = Study(
        {
            "experiment": {"task": "logistic:digits", "algorithm": "pure", "stop": {"steps": 60}},
            "tune": {"grid": {"algorithm.lr": [0.2, 1e-9]}, **tune},
            "target": {"accuracy": 1.0},
        }
    )
    ((one, _),) = study.run(made, tmp_path, jobs=1)
    floors = {}
    for line in lines.read_cells(tmp_path).values():
        floors[line["settings"]["algorithm"]["lr"]] = table.row(line, made.target)["floor"]
    assert floors[1e-9] > floors[0.2] + 0.1
    assert one.axes["algorithm.lr"] == 1e-9


def test_what_another_process_finished_meanwhile_is_not_run_again(tmp_path, monkeypatch):
    """It ends between this one's beginning and its turn."""
    opened = study.CellsFile

    def wait(folder):
        monkeypatch.setattr(study, "CellsFile", opened)
        study.run(small(), folder)
        return opened(folder)

    monkeypatch.setattr(study, "CellsFile", wait)
    study.run(small(), tmp_path)
    assert (tmp_path / lines.CELLS).read_bytes().count(b"\n") == 8


def test_a_script_need_not_guard_itself(tmp_path):
    """Processes do not run it again."""
    path = tmp_path / "script.py"
    path.write_text(f"""
from pathlib import Path
from offbeat.runtime.studies import study
print("begun")
cells = study.run(study.Study({SMALL!r}), Path({str(tmp_path)!r}), jobs=2)
print([line.get("error") for _, line in cells])
""")
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.splitlines() == ["begun", str([None] * 8)], done.stderr


def test_run_folders_where_asked(tmp_path):
    shared = {**SMALL["experiment"], "fleet": "2 1..2"}  # as text: a page asks the run's own file
    made = small(seeds=1, grid={"algorithm": ["pure"]}, experiment=shared)
    ((one, line),) = study.run(made, tmp_path, folders=True)
    folder = tmp_path / study.FOLDERS / one.key
    assert api.replay(folder).final["loss"] == line["final"]["loss"]
    (drawn,) = report.data([tmp_path])["timelines"]
    assert drawn["workers"] == 2


# -- Tuning ---------------------------------------------------------------------------------------


def test_each_setting_takes_its_best_candidate(tmp_path):
    values = [0.5, 0.1, 0.02, 1e200]
    made = small(seeds=[0, 1], tune={"grid": {"algorithm.lr": values}, "by": "floor"})
    cells = study.run(made, tmp_path)
    rows = table.rows(made, cells)
    done = lines.read_cells(tmp_path)
    for axes in made.settings():
        floors = {}
        for lr in values:
            line = done[made._cell(axes | {"algorithm.lr": lr}, 0).key]
            floors[lr] = table.row(line, None).get("floor", float("inf"))
        best = min(floors, key=floors.get)
        mine = [row for row in rows if all(row[key] == axes[key] for key in axes)]
        assert {row["algorithm.lr"] for row in mine} == {best}
        assert {row["tuned_at_edge"] for row in mine} == {best == 0.5}
        assert [row["seed"] for row in mine] == [0, 1]
    assert len(cells) == 8
    assert len(done) == 4 * (4 + 1)  # candidates on the first seed, the best on the other


def test_halving_spends_the_same_on_every_method(tmp_path):
    values = [0.4, 0.2, 0.1, 0.05]
    tune = {"grid": {"algorithm.lr": values}, "by": "floor", "halving": 2.0}
    made = small(grid={"algorithm": ["pure", "shuffled"]}, tune=tune, seeds=1)
    assert made._shares() == [0.25, 0.5, 1.0]
    study.run(made, tmp_path)
    spent = {"pure": [], "shuffled": []}
    for line in lines.read_cells(tmp_path).values():
        spent[line["settings"]["algorithm"]["name"]].append(line["final"]["step"])
    assert sorted(spent["pure"]) == sorted(spent["shuffled"]) == [15] * 4 + [30] * 2 + [60]


# -- The table -----------------------------------------------------------------------------------


def test_what_was_not_finite_is_no_number_of_the_table():
    """A metric that overflowed, or was not known at first, is null in the file."""
    line = {
        "cell": "a", "reason": "steps", "wall_s": 1.0, "topology": None, "final": {"step": 30},
        "curve": {"step": [0, 10, 20, 30], "loss": [None, None, 0.1, None]},
    }  # fmt: skip
    found = table.row(line, judge.Target(metric="loss", level=0.5))
    assert (found["steps_to_target"], found["floor"]) == (20, None)


def test_numbers_are_kept_to_six_digits():
    values = 10.0 ** np.random.default_rng(0).uniform(-15, 15, 2000)
    kept = cell.short(np.array([values, -values]))
    assert kept[0].tolist() == [float(f"{value:.6g}") for value in values]
    assert (kept[1] == -kept[0]).all()


def test_a_table_is_tidy_and_read_in_one_line(tmp_path):
    made = Study(
        {
            "seeds": 2,
            "experiment": {"task": "least-squares(5)", "stop": {"steps": 200}},
            "grid": {"algorithm": ["dsgd", "dsgt"], "topology": ["ring:8", "complete:8"]},
            "target": {"loss": 0.05},
        }
    )
    rows = table.rows(made, study.run(made, tmp_path))
    for read, ending in ((pandas.read_csv, "csv"), (pandas.read_parquet, "parquet")):
        frame = read(table.write(rows, tmp_path / f"t.{ending}"))
        assert len(frame) == 8
        assert set(zip(frame["algorithm"], frame["topology"], frame["seed"], strict=True)) == {
            (a, t, s) for a in ("dsgd", "dsgt") for t in ("ring:8", "complete:8") for s in (0, 1)
        }
        complete = frame[frame["topology"] == "complete:8"]
        assert complete["gap"].to_numpy() == pytest.approx(1.0)
        ring = frame[(frame["topology"] == "ring:8") & (frame["algorithm"] == "dsgt")]
        assert ring["gap"].to_numpy() == pytest.approx(0.19526, abs=1e-5)
        assert (frame["bytes_to_target"].dropna() > 0).all()
        assert frame[frame["algorithm"] == "dsgt"]["steps_to_target"].notna().all()
    with pytest.raises(ConfigError, match=r"\.csv or \.parquet"):
        table.write(rows, tmp_path / "t.xlsx")


def test_a_value_that_is_no_word_is_told_in_words():
    assert table.text("fleet.stragglers", "") == "no stragglers"
    assert table.text("fleet.stragglers", "2x10") == "2x10"
    assert table.text("fleet.workers", 8) == 8


STUDIES = sorted((Path(__file__).parents[3] / "examples" / "studies").glob("*.toml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_studies_that_come_along_can_be_run(path):
    """Every value of every axis builds, in full and in short."""
    assert len(Study.read(path).settings()) >= 16
    assert len(Study.read(path, quick=True).plan({})[0]) >= 4


@pytest.mark.parametrize("name", ["", "..", "../up"])
def test_a_study_stays_in_its_own_folder(name, monkeypatch, capsys):
    words = ["offbeat", "study", str(STUDIES[0]), "--quick", "--set", f'name="{name}"']
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert f'no folder can be called "{name}"' in capsys.readouterr().err


def test_one_command_ends_with_table_and_report(tmp_path, monkeypatch, capsys):
    path = next(path for path in STUDIES if path.stem == "topology")
    words = ["offbeat", "study", str(path), "--quick", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "8 rows" in said
    frame = pandas.read_csv(tmp_path / "out" / "results.csv")
    assert set(zip(frame["algorithm"], frame["topology"], strict=True)) == {
        (a, t) for a in ("dsgd", "dsgt") for t in ("ring", "complete")
    }
    assert 'id="data"' in (tmp_path / "out" / "report.html").read_text()
