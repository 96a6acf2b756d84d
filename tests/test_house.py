"""The plan of the house: who may import whom, what a wheel holds, what the docs promise."""

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("topologies", "algorithms", "workers", "runtime", "deploy")
LEAF = "base"  # of runtime: every room may import it
FORBIDDEN = {"ray", "zmq", "time", "random", "asyncio", "threading"}
MAY_IMPORT = {
    "topologies": {"topologies"},
    "algorithms": {"algorithms", "topologies"},
    "workers": {"workers", "algorithms"},
    "runtime": {"topologies", "algorithms", "workers", "runtime"},
    "deploy": set(ROOMS),
}
# The command line, and offbeat.join in its place: where all rooms come together.
TOP = {"runtime/commands/cli.py", "runtime/join/run.py"}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield str(node.module)


@pytest.mark.parametrize("room", ROOMS)
def test_dependencies_run_one_way(room):
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        for name in imports(path):
            first, *rest = name.split(".")
            if room in ("algorithms", "topologies"):
                assert first not in FORBIDDEN, f"{path} imports {name}"
            if first == "offbeat" and rest:
                leaf = rest[0] == "runtime" and len(rest) > 1 and rest[1] == LEAF
                top = str(path.relative_to(ROOT)) in TOP
                assert leaf or top or rest[0] in MAY_IMPORT[room], f"{path} imports {name}"


# Who reads the wall clock: for a date that is shown, and to see by how much clocks differ.
WALL = re.compile(r"\btime\.time(_ns)?\(|\b(?:now|utcnow|today)\(|from time import .*\btime\b")
READS_DATES = {"runtime/transport/metrics.py", "runtime/report/report.py", "deploy/everywhere.py"}


def test_nothing_but_dates_depends_on_the_wall_clock():
    readers = set()
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            if WALL.search(path.read_text()):
                readers.add(str(path.relative_to(ROOT)))
    assert readers == READS_DATES


def test_the_leaf_imports_no_room():
    for path in (ROOT / "runtime" / LEAF).glob("*.py"):
        names = [name for name in imports(path) if name.startswith("offbeat")]
        assert all(name.split(".")[1:3] == ["runtime", LEAF] for name in names), path


def test_every_method_is_documented_where_it_is_declared():
    """What overrides a method that has a docstring needs none."""
    methods = [
        (path, method)
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
        for method in node.body
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_")
    ]
    documented = {method.name for _, method in methods if ast.get_docstring(method)}
    assert [f"{path}: {m.name}" for path, m in methods if m.name not in documented] == []


def test_importing_offbeat_is_light():
    """torch takes a second and 160 MB; it is loaded by what needs it."""
    code = "import sys, offbeat; print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_wheel_holds_exactly_the_rooms(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    packed = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    expected = {
        f"offbeat/{path.relative_to(ROOT)}"
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.suffix in (".py", ".html", ".css", ".js") or path.parent.parent.name == "recipes"
    } - {"offbeat/runtime/root.py", "offbeat/deploy/packaging.py"}
    assert packed == expected | {"offbeat/__init__.py", "offbeat/py.typed"}


def test_doctests():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--doctest-modules", "-p", "no:cacheprovider",
         "--import-mode=importlib", "--pyargs", "offbeat"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert int(passed[1]) >= 8


def test_readme_tables_name_every_method():
    from offbeat.algorithms.server import ALGORITHMS

    readme = (ROOT / "README.md").read_text()
    assert [name for name in ALGORITHMS if f"`{name}`" not in readme] == []


def test_every_test_asserts_something():
    """Each test function, itself or through a helper of its file, has an assertion."""

    def calls(node):
        found = (n.func for n in ast.walk(node) if isinstance(n, ast.Call))
        return {getattr(f, "attr", getattr(f, "id", "")) for f in found}

    def asserts(node):
        names = {name.split("_")[0] for name in calls(node)}
        return any(isinstance(n, ast.Assert) for n in ast.walk(node)) or names & {
            "assert",
            "raises",
        }

    seen = 0
    for path in (ROOT / "tests").rglob("test_*.py"):
        defined = {
            n.name: n
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.FunctionDef)
        }
        for name, node in defined.items():
            if name.startswith("test_"):
                helpers = [defined[call] for call in calls(node) & defined.keys()]
                assert any(map(asserts, [node, *helpers])), f"{path}: {name} asserts nothing"
                seen += 1
    assert seen > 200
