"""The plan of the house: who may import whom, what a wheel holds, what the docs promise."""

import ast
import re
import subprocess
import sys
import zipfile
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = ("topologies", "algorithms", "workers", "runtime", "deploy")
FORBIDDEN = {"ray", "zmq", "time", "random", "asyncio", "threading"}  # to mathematics
# CONTRIBUTING's table of rooms, bottom to top.
ORDER = re.findall(r"^\| `([a-z_/]+)/` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
ENTRANCES = {"runtime/root.py", "runtime/extend.py"}  # what hands names on, on top of everything
SOURCES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text())
    for room in ROOMS
    for path in sorted((ROOT / room).rglob("*.py"))
}


def imports(tree):
    """What is imported, wherever: ``a`` by ``import a``, ``a.b`` by ``from a import b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files_of(tree):
    """The files of ours that are imported: of a module, or of what a name comes from."""
    for name in imports(tree):
        module = name.removeprefix("offbeat.").replace(".", "/")
        package = module.rpartition("/")[0]
        places = [f"{at}{end}" for at in (module, package) for end in (".py", "/__init__.py")]
        yield from [place for place in places if place in SOURCES][:1]


def height(path):
    """Of its room in the table; what lies loose in ``runtime`` is below all."""
    return max((at for at, room in enumerate(ORDER) if path.startswith(f"{room}/")), default=-1)


def test_a_room_imports_only_rooms_below_it():
    wrong = [
        f"{path} imports {other}"
        for path, tree in SOURCES.items()
        if path not in ENTRANCES
        for other in files_of(tree)
        if height(other) > height(path)
    ]
    assert wrong == []


def test_no_imports_run_in_a_circle():
    graph = {path: set(files_of(tree)) - {path} for path, tree in SOURCES.items()}
    sorted_files = [*TopologicalSorter(graph).static_order()]  # CycleError names the files
    assert len(sorted_files) == len(SOURCES)


def test_the_page_of_the_architecture_has_every_file():
    """Each with the first line of its docstring: half a line a file."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    said = {
        path: (ast.get_docstring(tree) or "").split("\n")[0]
        for path, tree in SOURCES.items()
        if path.startswith("runtime/") and not path.endswith("__init__.py")
    }
    lines = {path: f"| `{path.removeprefix('runtime/')}` | {line} |" for path, line in said.items()}
    assert [line for line in lines.values() if line not in page] == []
    assert page.count("| `") == len(lines)


def test_mathematics_knows_no_clock_and_no_engine():
    for path, tree in SOURCES.items():
        if path.startswith(("algorithms/", "topologies/")):
            assert not {name.split(".")[0] for name in imports(tree)} & FORBIDDEN, path


def docstring_lines(node):
    said = node.body[0]
    return said.end_lineno - said.lineno + 1 if ast.get_docstring(node) is not None else 0


def test_rooms_files_and_functions_are_small():
    rooms = Counter(str(Path(path).parent) for path in SOURCES if not path.endswith("__init__.py"))
    assert {room: n for room, n in rooms.items() if room.startswith("runtime/") and n > 8} == {}
    everything = {path: (ROOT / path).read_text() for path in SOURCES}
    long = {path: n for path, text in everything.items() if (n := text.count("\n")) > 500}
    assert long == {}
    functions = {
        f"{path}: {node.name}": node.end_lineno - node.lineno + 1 - docstring_lines(node)
        for path, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }
    assert {name: n for name, n in functions.items() if n > 60} == {}
    assert [path for path, text in everything.items() if "# fmt:" in text] == []


def test_a_class_has_a_name_of_its_own():
    names = Counter(
        node.name
        for tree in SOURCES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, n in names.items() if n > 1] == []


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
    } - {f"offbeat/{path}" for path in (*ENTRANCES, "deploy/packaging.py")}
    assert packed == expected | {"offbeat/__init__.py", "offbeat/extend.py", "offbeat/py.typed"}


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
