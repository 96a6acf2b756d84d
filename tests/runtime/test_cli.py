"""The command line as its user meets it: tables, files, mistakes in one sentence."""

import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import offbeat
from offbeat.runtime.api import api
from offbeat.runtime.commands import cli
from offbeat.runtime.experiment.experiment import read

ROOT = Path(__file__).parents[2]

FILE = """
seed = 3
[task]
name = "quadratic"
dim = 4
[fleet]
workers = 4
speeds = "1..4"
[stop]
steps = 60
[[algorithm]]
name = "pure"
[[algorithm]]
name = "shuffled"
lr = 0.05
[[algorithm]]
name = "shuffled"
lr = 0.2
"""


@pytest.fixture
def offbeat_(monkeypatch, capsys, tmp_path):
    """Runs the command line in a folder of its own; answers (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["offbeat", *words])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def test_run_from_options_as_in_the_readme(offbeat_, tmp_path):
    code, out, _ = offbeat_(
        "run", "--algorithm", "shuffled", "--task", "logistic:digits", "--workers", "16",
        "--speeds", "lognormal(1.0)", "--steps", "300",
    )  # fmt: skip
    assert code == 0
    assert "accuracy" in out
    folder = tmp_path / "runs" / "run-001"
    assert (folder / "picture.png").stat().st_size > 10_000
    table = tomllib.loads((folder / "experiment.toml").read_text())
    assert table["fleet"]["speeds"] == "lognormal(1.0)"
    assert table["task"]["partition"] == "iid"  # defaults are written down


def test_a_comparison_from_a_file_resumes_and_replays(offbeat_, tmp_path):
    (tmp_path / "a.toml").write_text(FILE)
    code, out, _ = offbeat_("run", "a.toml", "--set", "fleet.workers=5", "--out", "out")
    assert code == 0
    labels = ["pure", "shuffled lr=0.05", "shuffled lr=0.2"]
    assert all(label in out for label in labels)
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir()) == labels
    first = api.checkpointed(tmp_path / "out" / labels[2])["x"]
    direct = offbeat.run("quadratic(4)", "shuffled(lr=0.2)", "5 1..4", stop={"steps": 60}, seed=3)
    np.testing.assert_array_equal(first, direct.x)
    assert offbeat_("replay", "out")[0] == 0
    code, out, _ = offbeat_("resume", "out", "--set", "stop.steps=90")
    assert code == 0
    assert out.count(" 90 ") >= 3
    code, _, err = offbeat_("run", "a.toml", "--out", "out")
    assert code == 2
    assert "not empty" in err
    assert offbeat_("run", "a.toml", "--out", "out", "--overwrite")[0] == 0


def test_overwrite_removes_only_runs(offbeat_, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("...")
    code, _, err = offbeat_("run", "--task", "quadratic", "--algorithm", "pure",
                            "--out", "precious", "--overwrite")  # fmt: skip
    assert code == 2
    assert "left alone" in err
    assert (tmp_path / "precious" / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("algorithms", ["ringleader(lr=0.1)", "Rennala SGD"]),
        ("tasks", ["logistic(data='digits'", "Quadratics around"]),
        ("speeds", ["markov", "trace(file)"]),
        ("partitions", ["dirichlet(alpha=0.5)"]),
        ("data", ["digits", "breast_cancer"]),
        ("topologies", ["torus(rows, columns", "Base-(k+1)"]),
        ("weights", ["lazy(of='metropolis')", "Metropolis-Hastings"]),
    ],
)
def test_list(offbeat_, what, expected):
    code, out, _ = offbeat_("list", what)
    assert code == 0
    for text in expected:
        assert text in out


@pytest.mark.parametrize(
    ("words", "facts", "picture"),
    [
        (["ring:16"], {"gap": "0.050747", "exact after": "never"}, "topology-ring-16.png"),
        (["ring:16", "--weights", "lazy"], {"gap": "0.0253735"}, "topology-ring-16.png"),
        (["base:6"], {"gap": "1", "exact after": "4"}, "topology-base-6.png"),
        (["mobile:1"], {"gap": "1"}, "topology-mobile-1.png"),
        (["ring:300"], {"edges": "300", "gap": "0.000146211"}, "topology-ring-300.png"),
    ],
)
def test_topology_prints_facts_and_draws(offbeat_, tmp_path, words, facts, picture):
    code, out, _ = offbeat_("topology", *words)
    assert code == 0
    said = {line[:19].strip(): line[19:].strip() for line in out.splitlines()}
    assert facts.items() <= said.items()
    assert (tmp_path / "runs" / picture).read_bytes().startswith(b"\x89PNG")


def test_a_graph_whose_places_are_names_is_drawn(offbeat_):
    import networkx as nx

    graph = nx.path_graph(3)
    nx.set_node_attributes(graph, "left", "pos")
    nx.write_graphml(graph, "named.graphml")
    code, _, _ = offbeat_("topology", "file('named.graphml')", "--out", "a.png")
    assert code == 0


def test_a_sequence_is_a_strip_of_rounds(offbeat_, tmp_path):
    widths = []
    for rounds in (2, 6):
        code, _, _ = offbeat_("topology", "matching:10", "--rounds", str(rounds), "--out", "a.png")
        assert code == 0
        header = (tmp_path / "a.png").read_bytes()[16:20]
        widths.append(int.from_bytes(header, "big") / rounds)
    assert widths == [585, 338]  # pixels a round: two are drawn larger
    seeds = []
    for seed in ("1", "1", "2"):
        offbeat_("topology", "matching:10", "--seed", seed, "--out", "a.svg")
        drawn = (tmp_path / "a.svg").read_text()
        seeds.append([line for line in drawn.splitlines() if line.startswith("L ")])
    assert seeds[0] == seeds[1] != seeds[2]


MISTAKES = [
    (["topology", "rng:16"], 'did you mean "ring"'),
    (["topology", "ring:16", "--weights", "lzy"], 'did you mean "lazy"'),
    (["topology", "base:6", "--weights", "lazy"], "--weights: base(n=6, peers=1) does not take it"),
    (["topology", "ring:16", "--seed", "3"], "--seed: ring("),
    (["topology", "star:9", "--weights", "uniform"], "take metropolis"),
    (["topology", "ring:16", "--out", "a.nonsense"], "nonsense"),
    (["run"], '[task] is missing; for example task = "logistic:digits", or --task logistic:digits'),
    (["run"], "[algorithm] is missing"),  # all mistakes at once
    (["run", "--task", "logistc:digits", "--algorithm", "pure"], 'did you mean "logistic"'),
    (["run", "--task", "logistic:digit", "--algorithm", "pure"], 'did you mean "digits"'),
    (["run", "--task", "quadratic", "--algorithm", "pur"], 'did you mean "pure"'),
    (["run", "--task", "quadratic", "--algorithm", "pure(lr=-1.0)"], "lr"),
    (["run", "--task", "quadratic", "--algorithm", "pure(lr=nan)"], "lr"),
    (["run", "--task", "quadratic", "--algorithm", "pure(lr='a')"], "valid number"),
    (["run", "--task", "quadratic", "--algorithm", "pure(rl=1.0)"], 'unknown key "rl"'),
    (["run", "--task", "quadratic", "--algorithm", "pure", "--workers", "0"], "workers"),
    (["run", "--task", "quadratic", "--algorithm", "pure", "--steps", "0"], "steps"),
    (["run", "--task", "quadratic", "--algorithm", "pure", "--set", "stop.stpes=3"],
     'did you mean "steps"'),
    (["run", "--task", "quadratic", "--algorithm", "pure", "--set", "flet.workers=3"],
     'unknown key "flet"; did you mean "fleet"'),
    (["run", "--task", "quadratic", "--algorithm", "pure", "--set", "engine=rai"], "no engine"),
    (["run", "--task", "quadratic", "--algorithm", "pure", "--seed", "-1"], "seed"),
    (["run", "--task", "quadratic", "--algorithm", "pure", "--set", "x"], "--set key.key=value"),
    (["run", "--task", "logistic:iris", "--algorithm", "pure", "--workers", "151"],
     "only 150 samples"),
    (["run", "--task", "logistic:iris", "--algorithm", "pure", "--speeds", "normall"],
     'did you mean "normal"'),
    (["run", "nowhere.toml"], "nowhere.toml: cannot be read"),
    (["run", "bad.toml"], "bad.toml: is not TOML"),
    (["run", "typo.toml"], 'typo.toml: unknown key "stp"; did you mean "stop"'),
    (["run", "typo.toml", "--task", "quadratic"], "has its own task"),
    (["resume", "nothing"], "is no run folder"),
    (["replay", "nothing"], "is no run folder"),
    (["list", "algorithm"], 'did you mean "algorithms"'),
]  # fmt: skip


def test_who_resumes_a_served_run_is_told_what_it_waits_for(offbeat_, tmp_path, caplog):
    engine = 'engine = { name = "zmq", processes = 0, most_idle_s = 1.5 }\nfleet = "2 real"\n'
    (tmp_path / "a.toml").write_text(f'task = "quadratic"\nalgorithm = "pure"\n{engine}')
    api.prepare(read(tmp_path / "a.toml")[0], tmp_path / "run")
    code, _, err = offbeat_("resume", "run")
    assert code == 5, err
    assert "server 1 listens at tcp://127.0.0.1" in caplog.text
    assert "waiting for workers; let some join with: offbeat join tcp://127.0.0.1" in caplog.text


TWICE = [
    ("run --task quadratic --algorithm pure --seed 1 --seed 2", "--seed is given"),
    ("run --task quadratic --task quadratic --algorithm pure", "--task is given"),
    ("run --task quadratic --algorithm pure --steps 5 --set stop.steps=9", "stop.steps is set"),
    ("run a.toml --set seed=1 --set seed=2", "seed is set"),
    ("run a.toml --seed 1 --set seed=2", "seed is set"),
    ("resume runs/run-001 --engine virtual --engine virtual", "--engine is given"),
    ("resume run --set stop.steps=70 --set stop.steps=80", "stop.steps is set"),
    ("topology ring:4 --rounds 2 --rounds 3", "--rounds is given"),
    ("study s.toml --jobs 1 -j 2", "--jobs is given"),
    ("study s.toml --set grid.seed=[1] --set grid.seed=[2]", "grid.seed is set"),
    ("run a.toml --steps 5 --set stop={seconds=9}", "stop.steps is set"),
    ("serve a.toml --out a --out b", "--out is given"),
    ("serve a.toml --max-failed-saves 2 --set record.max_failed_saves=3", "saves is set"),
    ("join tcp://127.0.0.1:1 --name a --name b", "--name is given"),
    ("keys new a --keys a --keys b", "--keys is given"),
    ("deploy ssh a.toml --nodes a --nodes b", "--nodes is given"),
]


@pytest.mark.parametrize(("line", "said"), TWICE)
def test_what_counts_once_is_given_once(offbeat_, tmp_path, line, said):
    (tmp_path / "a.toml").write_text('task = "quadratic"\nalgorithm = "pure"\n')
    study = '[experiment]\ntask = "quadratic"\nalgorithm = "pure"\n[grid]\nseed = [1]\n'
    (tmp_path / "s.toml").write_text(study)
    if line.startswith("resume run "):
        offbeat.run("quadratic", "pure", "2", stop={"steps": 60}, folder=tmp_path / "run")
    code, _, err = offbeat_(*line.split())
    assert (code, err.count("\n")) == (2, 1)
    assert f"{said} more than once; only one counts" in err


def test_what_may_be_given_often_still_can(offbeat_):
    words = "run --task quadratic --algorithm pure --algorithm sgd --set stop.steps=5 --set seed=3"
    code, out, err = offbeat_(*words.split(), "--overwrite", "--overwrite", "--out", "run")
    assert code == 0, err
    assert "sgd" in out


def test_a_file_that_ends_too_soon_in_a_users_code_is_no_abort(offbeat_, tmp_path, monkeypatch):
    def torn(*parts, **more):
        raise EOFError("no data left")

    monkeypatch.setattr(cli, "go_on", torn)
    with pytest.raises(RuntimeError, match="ended too soon: no data left"):
        offbeat_("run", "--task", "quadratic", "--algorithm", "pure")


@pytest.mark.parametrize("start", ["-", "--", "-k"])
def test_a_key_may_begin_with_a_dash(offbeat_, tmp_path, start):
    key = start + "a" * (-len(start) % 5) + "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H"
    code, _, err = offbeat_("keys", "authorize", "w1", key, "--keys", "keys")
    assert code == 0, err
    assert f'public-key = "{key}"' in (tmp_path / "keys/authorized/w1.key").read_text()


@pytest.mark.parametrize(("words", "said"), MISTAKES)
def test_mistakes_cost_one_sentence_and_exit_2(offbeat_, tmp_path, words, said):
    (tmp_path / "bad.toml").write_text("task = [")
    (tmp_path / "typo.toml").write_text('task = "quadratic"\nalgorithm = "pure"\nstp = 3\n')
    code, _, err = offbeat_(*words)
    assert said in err
    assert code == 2
    assert err.startswith("offbeat: ")
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()  # nothing was begun


@pytest.mark.parametrize(
    "line",
    ["task = 3", "task = []", "algorithm = 3", "algorithm = [3]", "algorithm = []", "fleet = []",
     'stop = "x"', "seed = 1.5", "[evaluate]\nsteps = 0", "record = 1", "engine = 2"],
)  # fmt: skip
def test_tables_of_the_wrong_type(offbeat_, tmp_path, line):
    key = line.split()[0].strip("[]")
    lines = {"task": 'task = "quadratic"', "algorithm": 'algorithm = "pure"', key: line}
    (tmp_path / "a.toml").write_text("\n".join(lines.values()) + "\n")
    code, _, err = offbeat_("run", "a.toml")
    assert code == 2
    assert err.startswith("offbeat: a.toml: ")
    assert key in err
    assert "constrained" not in err


def test_overwrite_needs_a_run_even_where_the_name_fits(offbeat_, tmp_path):
    (tmp_path / "proj").mkdir()
    (tmp_path / "proj" / "thesis.txt").write_text("...")
    (tmp_path / "proj" / "experiment.toml").write_text(FILE)
    for out in ("proj", "."):
        code, _, err = offbeat_(
            "run", "proj/experiment.toml", "--out", out, "--overwrite", "--steps", "9"
        )
        assert code == 2
        assert "left alone" in err
    assert sorted(p.name for p in (tmp_path / "proj").iterdir()) == [
        "experiment.toml", "thesis.txt",
    ]  # fmt: skip
    (tmp_path / "file").write_text("")
    assert offbeat_("run", "proj/experiment.toml", "--out", "file", "--overwrite")[0] == 6


def test_overwrite_leaves_a_run_where_no_other_begins(offbeat_, tmp_path):
    words = ["--task", "quadratic", "--algorithm", "pure", "--steps", "9", "--out", "out"]
    assert offbeat_("run", *words)[0] == 0
    before = (tmp_path / "out" / "trace.jsonl").read_bytes()
    words += ["--overwrite", "--speeds", "1..4"]
    code, _, err = offbeat_("run", *words, "--engine", "zmq(bind='tcp://256.0.0.1:*')")
    assert (code, err.count("\n")) == (2, 1), err
    assert (tmp_path / "out" / "trace.jsonl").read_bytes() == before
    assert offbeat_("run", *words)[0] == 0
    assert (tmp_path / "out" / "trace.jsonl").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_method_that_diverges_does_not_stop_the_others(offbeat_, tmp_path):
    words = ["--task", "quadratic", "--steps", "400", "--out", "out[b]"]
    for method in ("pure", "pure(lr=1e6)", "shuffled"):
        words += ["--algorithm", method]
    code, out, err = offbeat_("run", *words)
    assert code == 7
    assert "pure lr=1000000.0: the" in err
    assert "shuffled" in out
    assert f"picture: {Path('out[b]') / 'picture.png'}" in out
    assert (tmp_path / "out[b]" / "picture.png").exists()


def test_options_may_hold_quotes_in_a_files_run(offbeat_, tmp_path):
    (tmp_path / "a.toml").write_text(FILE)
    code, _, err = offbeat_(
        "run", "a.toml", "--out", "o", "--speeds", 'lognormal(1.0, per="worker")'
    )
    assert code == 0, err


def test_divergence_is_one_sentence_and_exit_7(offbeat_):
    code, _, err = offbeat_("run", "--task", "quadratic", "--algorithm", "pure(lr=100.0)")
    assert code == 7
    assert "is not finite, at step" in err
    assert err.count("\n") == 1


def test_help_says_what_there_is():
    done = subprocess.run(
        [sys.executable, "-m", "offbeat.runtime.commands.cli", "run", "--help"],
        capture_output=True, text=True, check=True, env={"COLUMNS": "120", "PATH": ""},
    )  # fmt: skip
    for option in ("--algorithm", "--task", "--workers", "--speeds", "--set", "--out"):
        assert option in done.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.toml")), ids=lambda p: p.stem)
def test_examples_run(path):
    """Each of them as it stands, but for its end."""
    for experiment in read(path, {"stop": {"steps": 2}}):
        result = api.execute(experiment)
        assert result.reason == "steps"
        assert np.isfinite(result.final["loss"])


def test_engine_clock_and_pace_are_settings(offbeat_):
    words = ("run", "--algorithm", "pure", "--task", "quadratic(3)", "--steps", "20")
    code, _, _ = offbeat_(*words, "--engine", "virtual", "--clock", "virtual", "--pace", "0.5",
                          "--out", "out")  # fmt: skip
    table = tomllib.loads(Path("out/experiment.toml").read_text())
    assert (code, table["engine"], table["clock"], table["pace"]) == (0, "virtual", "virtual", 0.5)
    code, _, err = offbeat_(*words, "--clock", "real")
    assert code == 2
    assert 'clock must be virtual with engine = "virtual", not "real"' in err
    code, _, err = offbeat_("resume", "out", "--engine", "virtaul")
    assert code == 2
    assert 'no engine is called "virtaul"; did you mean "virtual"?' in err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--task", "quadratic(100000000000000)"], 1, "not enough memory: Unable to allocate"),
        (["--task", "lm(/tmp/text)"], 2, "name:argument, with quotes around a path"),
        (["--set", "stop={loss=0.1}"], 2, "stop: a target loss may never be reached"),
        (["--task", "mixtures(classes=1)"], 2, "mixtures: needs two classes"),
        (
            ["--steps", "9", "--set", "evaluate={}", "--set", "stop.loss=0.1"],
            2,
            "stop.loss: the run never eval",
        ),
    ],
)
def test_what_cannot_be_is_one_sentence(offbeat_, words, code, said):
    task = [] if "--task" in words else ["--task", "quadratic"]
    ended, _, err = offbeat_("run", "--algorithm", "pure", *task, *words)
    assert ended == code
    assert said in err
    assert "stop: stop" not in err
    assert len(err.splitlines()) == 1
