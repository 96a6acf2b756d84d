"""The report: what is in it is what was recorded, and a browser shows it without a complaint."""

import json
import re
import shutil
import subprocess
import tempfile
import threading
import urllib.error
import urllib.request
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.image
import networkx as nx
import numpy as np
import pandas
import pytest
from cells import Scored
from matplotlib import pyplot as plt

import offbeat
from offbeat import topologies as offbeat_topologies
from offbeat.algorithms.server.method import Finisher, Method, Schedule, StepSize
from offbeat.runtime.api import api, plots
from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.commands import runs
from offbeat.runtime.experiment.experiment import from_table
from offbeat.runtime.report import figures, recorded, report, watch
from offbeat.runtime.report.scenes import COMMUNICATE, COMPUTE, QUEUE, graphs, timeline
from offbeat.runtime.run.records import TRACE_COLUMNS
from offbeat.runtime.studies import cell, fits, lines, study
from offbeat.runtime.studies import table as tables
from offbeat.runtime.studies.study import Study
from offbeat.workers.speeds import Law, Recorded

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--enable-logging=stderr", "--virtual-time-budget=4000", "--dump-dom",
)  # fmt: skip

GOSSIP = {
    "name": "graphs <script>alert(1)</script>",
    "about": "Who talks to whom </script><b>",
    "seeds": 2,
    "experiment": {"task": "least-squares(5)", "stop": {"steps": 300}},
    "grid": {
        "algorithm": ["dsgd(lr=0.01)", "dsgt(lr=0.01)"],
        "topology": ["ring:6", "ring:12", "complete:8", "one-peer-exponential:8"],
    },
    "target": {"loss": 0.5},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A study on graphs, a comparison of server methods with its timelines, a gossip run."""
    root = tmp_path_factory.mktemp("report")
    study.run(Study(GOSSIP), root / "study")
    table = {
        "task": "quadratic(3)",
        "algorithm": ["pure", "random"],
        "fleet": {"workers": 5, "speeds": "1..5", "latency_s": 0.5},
        "stop": {"steps": 200},
    }
    runs.prepare_all(from_table(table), root / "comparison")
    for name in ("pure", "random"):
        api.resume(root / "comparison" / name)
    for mode in ("synchronous", "asynchronous"):
        offbeat.run(
            "least-squares(5)", "dsgt(lr=0.01)", "6 1..6", "ring", mode=mode,
            stop={"steps": 100}, record={"nodes": True}, folder=root / mode,
        )  # fmt: skip
    return root


def browse(address):
    """(the page after its script ran, what the browser had to say)."""
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", address],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def shown(dom):
    """The sections of a page with the number of figures in each."""
    parts = re.findall(r'<section id="(\w+)">(.*?)</section>', dom, re.DOTALL)
    return {name: inside.count('role="img"') for name, inside in parts}


# -- In a browser ---------------------------------------------------------------------------------


@needs_chromium
def test_a_browser_shows_every_figure_from_a_file(folders, tmp_path):
    names = ("study", "comparison", "synchronous", "asynchronous")
    page = report.write([folders / name for name in names], tmp_path / "page.html")
    dom, complaints = browse(page.as_uri())
    assert complaints == []
    assert 'aria-pressed="false"' in dom  # what is off looks so
    assert "·  ·" not in dom
    assert not re.search(r"<span>[^<]* · (·|<)", dom)
    found = shown(dom)
    assert found == {
        "curves": 3, "targets": 1, "gap": 1, "graphs": 6, "timeline": 1, "staleness": 1, "table": 0
    }  # fmt: skip
    assert "<svg" in dom
    assert "NaN" not in dom.split("<main>")[1].split("</main>")[0]
    assert "<script>alert" not in dom


@needs_chromium
def test_a_browser_shows_a_single_run_and_a_study_of_one_cell(folders, tmp_path):
    one = {
        **GOSSIP,
        "name": "one",
        "seeds": 1,
        "grid": {"algorithm": ["dsgd"], "topology": ["ring:6"]},
    }
    study.run(Study(one), tmp_path / "one")
    for folder in (folders / "comparison" / "pure", tmp_path / "one"):
        page = report.write([folder], tmp_path / "page.html")
        dom, complaints = browse(page.as_uri())
        assert complaints == []
        assert shown(dom)["curves"] >= 2


@needs_chromium
def test_a_browser_follows_a_run_on_loopback(folders):
    server = watch.make_server(folders / "comparison", 0, 0.5)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        dom, complaints = browse(f"http://127.0.0.1:{server.server_port}/")
    finally:
        server.shutdown()
        server.server_close()
    assert complaints == []
    assert shown(dom)["timeline"] == 1


# -- What is in it ---------------------------------------------------------------------------------


def test_a_page_needs_nothing_else(folders, tmp_path):
    text = report.write([folders / "study"], tmp_path / "page.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert text.count("</script>") == 2  # none that was slipped in
    assert len(text) < 400_000


def test_curves_are_what_was_recorded(folders):
    found = report.data([folders / "study"])
    assert (found["x"], found["y"][0]) == (["step", "time_s", "bytes"], "loss")
    assert len(found["runs"]) == 16
    assert len(found["settings"]) == 8
    result = offbeat.run(
        "least-squares(5)", "dsgd(lr=0.01)", topology="ring:6", stop={"steps": 300}, seed=1
    )
    mine = next(
        run for run in found["runs"]
        if run["seed"] == 1 and found["settings"][run["s"]]["name"] == "dsgd(lr=0.01) · ring:6"
    )  # fmt: skip
    assert mine["c"]["loss"] == pytest.approx(result.column("loss").tolist(), rel=1e-4)
    assert mine["c"]["bytes"] == pytest.approx(result.column("bytes").tolist(), rel=1e-4)


def test_numbers_of_the_page_are_those_of_the_table(folders):
    """Medians over the seeds, in the page's units."""
    made = Study(GOSSIP)
    done = lines.read_cells(folders / "study")
    frame = pandas.DataFrame(tables.rows(made, [(c, done[c.key]) for c in made.plan(done)[1]]))
    middle = frame.groupby(["algorithm", "topology"]).median(numeric_only=True)
    shown = report.data([folders / "study"])["table"]
    names = [name for name, _ in shown["columns"]]
    assert len(shown["rows"]) == len(middle) == 8
    for row in shown["rows"]:
        there = dict(zip(names, row, strict=True))
        mine = middle.loc[(there["method"], there["topology"])]
        for name, column, unit in (
            ("gap", "gap", 1), ("last fifth", "floor", 1), ("loss", "loss", 1),
            ("rounds", "step", 1), ("steps to target", "steps_to_target", 1),
            ("MB to target", "bytes_to_target", 1e6), ("MB sent", "bytes", 1e6),
            ("farthest node", "loss_worst", 1),
        ):  # fmt: skip
            assert there[name] == pytest.approx(mine[column] / unit, rel=1e-4), name


def test_a_study_is_shown_where_its_data_are_no_longer(tmp_path, monkeypatch):
    data = tmp_path / "a.svm"
    data.write_text("".join(f"{(-1) ** i} 1:{i} 2:{i % 3}\n" for i in range(8)))
    made = Study(
        {
            "experiment": {
                "task": {"name": "logistic", "data": str(data)},
                "algorithm": "pure",
                "fleet": {"workers": 2},
                "stop": {"steps": 5},
            }
        }
    )
    study.run(made, tmp_path / "out")
    data.unlink()
    assert len(report.data([tmp_path / "out"])["runs"]) == 1
    assert watch.look(tmp_path / "out")[1]


def test_runs_of_another_version_are_told(folders, tmp_path):
    shutil.copytree(folders / "study", tmp_path / "study")
    monkey = tmp_path / "study" / lines.CELLS
    first, *others = monkey.read_bytes().splitlines(keepends=True)
    other = cell.decode(first) | {"version": "9.0", "cell": "0"}
    monkey.write_bytes(b"".join([cell.encode(other), *others]))
    found = report.data([tmp_path / "study"])
    assert len(found["runs"]) == 15
    assert "Not shown: runs of offbeat 9." in found["notes"][1]


def test_what_differs_in_kind_is_named_by_what_it_has(folders):
    """No empty words in the names, and server steps are no rounds."""
    found = report.data([folders / "comparison", folders / "synchronous"])
    assert found["columns"]["step"]["label"] == "steps"
    names = [name for _, name, _ in figures._shown(found, every=True)]
    assert len(names) == 3
    assert all(name == name.strip(" ·") and "·  ·" not in name for name in names)


def test_runs_that_differ_in_the_seed_alone_are_one_setting(tmp_path):
    for seed in (1, 2):
        for lr in (0.1, 0.2):
            offbeat.run(
                "quadratic(3)", f"pure(lr={lr})", stop={"steps": 50}, seed=seed,
                folder=tmp_path / f"{seed}-{lr}",
            )  # fmt: skip
    found = report.data(sorted(tmp_path.iterdir()))
    assert [one["name"] for one in found["settings"]] == ["pure lr=0.1", "pure lr=0.2"]
    assert [run["s"] for run in found["runs"]] == [0, 1, 0, 1]


def test_the_slope_of_rounds_against_the_gap_is_fitted():
    gaps = np.array([0.5, 0.1, 0.02, 0.004])
    fit = fits.slope(gaps, 30 * gaps**-1.5)
    assert fit["slope"] == pytest.approx(-1.5)
    assert fit["error"] == pytest.approx(0, abs=1e-6)
    noisy = 30 * gaps**-1.0 * np.array([1.1, 0.9, 1.1, 0.9])
    assert abs(fits.slope(gaps, noisy)["slope"] + 1) < 3 * fits.slope(gaps, noisy)["error"]
    assert fits.slope([0.1, 0.2], [1.0, 2.0]) is None


def test_the_time_of_workers_is_computing_sending_and_waiting():
    """Two workers by hand: 1 gets a second job while it is busy."""
    rows = [  # time_s, worker, job, read_step, step, start_s, end_s
        [1.5, 0, 0, 0, 0, 0.0, 1.0],  # then (at 1.5) worker 1 is given another
        [4.5, 1, 0, 0, 1, 0.0, 4.0],
        [8.5, 1, 1, 1, 2, 4.0, 8.0],
    ]
    found = timeline(np.array(rows), 2, gossip=False)
    whole = 2 * 8.5
    assert found["shares"]["compute"] == pytest.approx(9 / whole)
    assert found["shares"]["communicate"] == pytest.approx(1.5 / whole)
    assert found["shares"]["wait"] == pytest.approx(1 - 10.5 / whole)
    assert found["shares"]["queue"] == pytest.approx(2.5 / 8.5)  # from 1.5 to 4
    spans = {(kind, worker, start, end) for kind, worker, start, end, _ in found["spans"]}
    assert {(COMPUTE, 1, 4.0, 8.0), (QUEUE, 1, 1.5, 4.0), (COMMUNICATE, 0, 1.0, 1.5)} <= spans
    assert len(TRACE_COLUMNS) == len(rows[0])


def test_graphs_have_their_edges_round_by_round_and_losses_where_recorded(folders):
    graphs = {one["name"]: one for one in report.data([folders / "study"])["graphs"]}
    changing = graphs["one-peer-exponential(n=8)"]
    assert [len(edges) for edges in changing["rounds"]] == [8, 8, 8]
    assert "not recorded" in changing["facts"]
    assert all("loss" not in frame for frame in changing["frames"])
    (ring,) = report.data([folders / "synchronous"])["graphs"]
    metrics = recorded.rows(folders / "synchronous" / "metrics.jsonl")
    assert ring["frames"][-1]["loss"] == pytest.approx(metrics[-1]["node_loss"], rel=1e-3)
    (pairs,) = report.data([folders / "asynchronous"])["graphs"]
    assert {len(frame["active"]) for frame in pairs["frames"]} == {1}


def test_every_figure_is_also_a_file(folders, tmp_path):
    found = [folders / "study", folders / "comparison", folders / "synchronous"]
    report.write(found, tmp_path / "page.html", figures=True)
    files = {path.name: path for path in (tmp_path / "page-figures").iterdir()}
    names = ("progress", "targets", "gap", "graphs", "timeline", "staleness")
    assert set(files) == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    for name, path in files.items():
        if name.endswith("png"):
            picture = matplotlib.image.imread(path)
            assert picture.std() > 0.02, f"{name} is empty"
        else:
            assert ElementTree.parse(path).getroot().tag.endswith("svg")


def test_a_long_legend_covers_no_curve():
    figure, axes = plt.subplots(layout="constrained")
    for name in range(plots.INSIDE + 1):
        axes.plot([1, 2], label=f"setting {name}")
    plots.legend(figure, axes)
    figure.canvas.draw()
    (beside,) = figure.legends
    assert beside.get_window_extent().x0 > axes.get_window_extent().x1
    plt.close(figure)


@pytest.mark.parametrize("ratio", [3, 20])
def test_no_two_ticks_overlap(ratio):
    run = [{"s": at, "t": {"steps_to_target": 190 * ratio**at}} for at in range(3)]
    data = {
        "axes": [{"values": ["a", "b", "c"], "short": ["a", "b", "c"], "first": None}],
        "settings": [{"at": [at], "name": str(at)} for at in range(3)],
        "colour": 0, "runs": run, "target": None,
        "measures": [{"key": "steps_to_target", "label": "steps"}],
    }  # fmt: skip
    figure = figures._targets(plt, data)
    figure.canvas.draw()
    labels = [tick.label1 for tick in figure.axes[0].xaxis._update_ticks()]
    boxes = [label.get_window_extent() for label in labels if label.get_text()]
    assert len(boxes) >= 2
    assert all(one.x1 < other.x0 for one, other in pairwise(boxes))
    plt.close(figure)


def test_a_folder_that_is_no_run_is_told(tmp_path):
    with pytest.raises(ConfigError, match="neither a run"):
        report.data([tmp_path])


# -- Of what was made in Python -----------------------------------------------------------------


def grid_of_names():
    """Nine nodes with names that are no numbers."""
    return nx.grid_2d_graph(3, 3)


LAW = Law(1.0, lambda means, seed: Recorded([[1.0, 2.0]] * 4))


def walking():
    """Two graphs in turn, by hand."""
    graphs = [offbeat_topologies.TOPOLOGIES.parse(name) for name in ("ring:4", "complete:4")]
    return offbeat_topologies.Topology(4, lambda k: graphs[k].matrix(), period=2)


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    """Runs of a task, a method and graphs that no text makes."""
    root = tmp_path_factory.mktemp("by_hand")
    stop = {"steps": 60}
    server = "shuffled(lr=0.05)", "4 1..4"
    offbeat.run(Scored({"auc": "higher"}), *server, stop=stop, folder=root / "task")
    for name, lr in (("method", 0.1), ("other", 0.01)):
        made = Method(Schedule(Finisher()), [StepSize(lr)])
        offbeat.run("quadratic(3)", made, server[1], stop=stop, folder=root / name)
    gossip = "least-squares(5)", "dsgd(lr=0.01)"
    offbeat.run(*gossip, topology=grid_of_names(), stop=stop, folder=root / "graph")
    offbeat.run(*gossip, topology=np.full((3, 3), 1 / 3), stop=stop, folder=root / "matrix")
    offbeat.run(*gossip, topology=walking(), stop=stop, folder=root / "walking")
    fleet = offbeat.Fleet(workers=4, speeds=LAW)
    offbeat.run("quadratic(3)", "pure", fleet, stop=stop, folder=root / "fleet")
    return root


def test_a_page_needs_what_was_recorded_and_nothing_else(by_hand, tmp_path):
    folders = sorted(by_hand.iterdir())
    found = report.data(folders)
    report.write(folders, tmp_path / "page.html")
    names = [one["name"] for one in found["settings"]]
    assert len(found["runs"]) == len(set(names)) == 7
    assert [name for name in names if name.startswith("Method")] == [
        "Method · method", "Method · other",
    ]  # fmt: skip
    losses = {name: run["c"]["loss"][-1] for name, run in zip(names, found["runs"], strict=True)}
    told = recorded.rows(by_hand / "other" / "metrics.jsonl")[-1]["loss"]
    assert losses["Method · other"] == pytest.approx(told, rel=1e-4)
    assert "auc" in found["y"]
    assert found["columns"]["auc"]["better"] == "higher"
    drawn = {len(one["at"]): sum(map(len, one["rounds"])) for one in found["graphs"]}
    assert drawn == {9: 12, 3: 3}
    assert watch.look(by_hand / "task")[1]


def test_a_graph_made_in_python_needs_no_argument_again(by_hand, tmp_path):
    """It is in the folder, with the names of its nodes; W to the last bit, wherever it lies."""
    shutil.copytree(by_hand / "graph", tmp_path / "moved")
    kept = api.load_experiment(tmp_path / "moved").topology
    made = offbeat_topologies.from_networkx(grid_of_names())
    assert (kept.matrix().toarray() == made.matrix().toarray()).all()
    assert kept.graph().nodes[3]["label"] == "(1, 0)"
    more = api.resume(tmp_path / "moved", overrides=["stop.steps=90"])
    whole = offbeat.run(
        "least-squares(5)", "dsgd(lr=0.01)", topology=grid_of_names(), stop={"steps": 90}
    )
    assert (more.x == whole.x).all()
    assert (api.replay(tmp_path / "moved").x == whole.x).all()


def test_advice_names_arguments_that_there_are(by_hand, tmp_path):
    given = {
        "task": Scored({"auc": "higher"}),
        "algorithm": Method(Schedule(Finisher()), [StepSize(0.1)]),
        "topology": walking(),
        "fleet": offbeat.Fleet(workers=4, speeds=LAW),
    }
    kinds = ("task", "task"), ("method", "algorithm"), ("walking", "topology"), ("fleet", "fleet")
    for name, kind in kinds:
        shutil.copytree(by_hand / name, tmp_path / name)
        for again in (api.resume, api.replay):
            with pytest.raises(ConfigError, match=rf"offbeat.resume\(folder, {kind}=\.\.\.\)"):
                again(tmp_path / name)
            result = again(tmp_path / name, **{kind: given[kind]})
            assert result.final["step"] == 60


@pytest.mark.parametrize("ask", [lambda at: report.data([at]), watch.look, recorded.settings])
def test_a_file_in_a_folder_is_answered_with_the_folder(ask, folders):
    for path in (folders / "study" / "study.toml", folders / "synchronous" / "metrics.jsonl"):
        with pytest.raises(ConfigError, match=rf"is a file; name the folder .* {path.parent}$"):
            ask(path)


# -- Pictures -----------------------------------------------------------------------------------

GRID = {
    "experiment": {"task": "quadratic(3)", "stop": {"steps": 30}},
    "grid": {
        "algorithm": ["pure", "shuffled"],
        "algorithm.lr": [1e-6, 0.01, 0.02, 0.1],
        "fleet.workers": [4, 6],
    },
}


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """Sixteen settings; the smallest step size, the first value, is the worst."""
    root = tmp_path_factory.mktemp("grid")
    study.run(Study(GRID), root)
    return report.data([root])


def test_of_many_settings_the_best_is_shown_and_the_rest_is_counted(grid):
    shown = {at for at, _, _ in figures._shown(grid)}
    floors = {run["s"]: run["t"]["floor"] for run in grid["runs"]}
    assert len(shown) < 16
    assert min(floors, key=floors.get) in shown
    assert figures._fixed(grid).endswith(f"(of the best setting): {len(shown)} of 16 runs")
    assert "of ${DATA.runs.length} runs" in report.page(grid)


def test_a_line_is_fitted_through_marks_that_differ_in_nothing_else(folders, grid):
    (one,) = [one for one in grid["against"] if one["x"] == "algorithm.lr"]
    assert sorted(series["name"] for series in one["series"]) == [
        "pure · n 4", "pure · n 6", "shuffled · n 4", "shuffled · n 6",
    ]  # fmt: skip
    assert all(series["x"] == [1e-6, 0.01, 0.02, 0.1] for series in one["series"])
    (gap,) = report.data([folders / "study"])["against"]
    assert [series["name"] for series in gap["series"]] == ["dsgd", "dsgt"]


def test_a_floor_that_rises_is_fitted_by_nothing(tmp_path):
    rising = {
        "experiment": {"task": "logistic:digits", "algorithm": "pure", "stop": {"steps": 20}},
        "grid": {"algorithm.lr": [0.01, 0.1, 1.0]},
        "target": {"accuracy": 0.5},
    }
    study.run(Study(rising), tmp_path)
    found = report.data([tmp_path])
    assert found["against"] == []
    assert found["measures"][-1]["better"] == "higher"
    figure = figures._progress(plt, found)
    assert figure.axes[0].get_yscale() == "linear"
    plt.close(figure)


def test_no_two_lines_are_drawn_alike():
    names = ["ring", "matching", "base", "path", "star", "complete", "simple-base", "hypercube"]
    results = [
        offbeat.run(
            "least-squares(5)", f"{method}(lr=0.01)", topology=f"{name}:8", stop={"steps": 2}
        )
        for name in names
        for method in ("dsgd", "dsgt")
    ]
    assert len({str(style) for style in plots._lines(results)}) == 16
    assert len(set(plots.called([result.experiment for result in results]))) == 16
    dashes = re.search(r"DASHES = (\[.*?\])", (report.HERE / "report.js").read_text())[1]
    assert len(set(json.loads(dashes))) == len(json.loads(dashes)) >= 8


def test_an_axis_of_unlike_runs_has_no_kink(tmp_path, monkeypatch):
    """Logarithmic all along, and nothing drawn where there was no evaluation."""
    monkeypatch.setattr(plt, "close", lambda figure: None)
    short, long = (
        offbeat.run("quadratic(3)", "pure", stop={"steps": steps}) for steps in (50, 1000)
    )
    short.plot(tmp_path / "a.png", long)
    axes = plt.gcf().subfigs[0].axes[1]
    monkeypatch.undo()
    plt.close("all")
    assert axes.get_xscale() == "log"
    x = axes.lines[0].get_transform().transform(np.column_stack(axes.lines[0].get_data()))
    assert np.isnan(x[0]).any()
    assert np.isfinite(x[1:]).all()


# -- Watching --------------------------------------------------------------------------------


def test_a_run_that_goes_on_is_shown_as_far_as_it_is(folders, tmp_path):
    whole = folders / "comparison" / "pure"
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:51]) + lines[51][:20])  # it is just being written
    _, ended = watch.look(tmp_path / "run")
    assert not ended
    assert watch._fraction(tmp_path / "run", recorded.rows(path)[-1]) == pytest.approx(0.5)
    assert watch.look(whole)[1]
    found = report.data([tmp_path / "run"])
    assert found["runs"][0]["c"]["step"][-1] == 100


def test_a_study_that_goes_on_is_counted(folders, tmp_path):
    assert watch.look(folders / "study")[1]
    made = Study(GOSSIP)
    shutil.copytree(folders / "study", tmp_path / "study")
    path = tmp_path / "study" / lines.CELLS
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:5]))
    shown, ended = watch.look(tmp_path / "study")
    assert not ended
    assert "5 runs done, 11 to go" in str(shown.renderables[0])
    assert len(made.plan(lines.read_cells(tmp_path / "study"))[0]) == 11


def test_the_server_is_for_this_machine_only(folders):
    server = watch.make_server(folders / "comparison", 0, 2.0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        assert server.server_address[0] == "127.0.0.1"
        found = json.load(urllib.request.urlopen(f"{address}/data.json", timeout=30))
        assert (found["live_s"], len(found["runs"])) == (2.0, 2)
        for path, host, code in (("/", "evil.example", 403), ("/../x", "localhost", 404)):
            request = urllib.request.Request(address + path, headers={"Host": host})
            with pytest.raises(urllib.error.HTTPError) as error:
                urllib.request.urlopen(request, timeout=30)
            assert error.value.code == code
            error.value.close()
        with pytest.raises(ConfigError, match="port"):
            watch.make_server(folders / "comparison", server.server_port, 2.0)
    finally:
        server.shutdown()
        server.server_close()


def test_a_page_calls_nodes_by_their_names():
    cities = offbeat_topologies.from_networkx(nx.path_graph(["oslo", "bern", "rome"]))
    trace = np.array([[2.0, 1, 0, 0, 0, 0.0, 2.0]])
    made = graphs(cities, [], trace)
    assert list(made["names"]) == ["oslo", "bern", "rome"]
    assert made["frames"][0]["said"] == "2 s: node bern ends its job 0"
    page = (Path(report.__file__).parent / "report.js").read_text()
    assert "<title>node ${esc(one.names[i])}$" in page
