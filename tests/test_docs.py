"""Every command line of README, docs and examples: run with few steps, or read by its parser."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import offbeat
from offbeat.runtime.commands import cli
from offbeat.runtime.transport import keys

ROOT = Path(__file__).parents[1]
NAMED = subprocess.run(
    ["git", "-C", str(ROOT), "ls-files", "*.md", "examples"], capture_output=True, text=True
).stdout.split() or [str(path.relative_to(ROOT)) for path in ROOT.glob("*.md")]
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
# In a sentence, or in the comment at the head of an example.
SAID = re.compile(
    r"`((?:offbeat|python) [^`]*)`|^(?:#\s+|    )((?:offbeat|python) .*)$", re.MULTILINE
)
RUNNING = {"list", "topology", "resume", "replay", "report", "watch", "whatif", "keys", "deploy"}
READ = {"study", "serve", "join", "status", "peer", "doctor"}  # which need others, or long
EXPERIMENT = 'task = "quadratic"\nalgorithm = "pure"\nfleet = "3"\n[stop]\nsteps = 20\n'


def commands(text):
    """The commands of a block, a list of words each; ``$NAME`` is what was given before."""
    given = {}
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"\s&&\s", line):
            for name, value in given.items():
                part = part.replace(f"${name}", value)
            words = shlex.split(part, comments=True)
            if words and (assigned := re.fullmatch(r"([A-Z]+)=(.*)", words[0])):
                given[assigned[1]] = assigned[2]
            elif words:
                yield words


def found():
    for name in NAMED:
        if not name.endswith((".md", ".toml", ".py")):
            continue
        text = (ROOT / name).read_text()
        blocks = [block[1] for block in BLOCK.finditer(text)]
        for words in (words for block in blocks for words in commands(block)):
            yield pytest.param(words, True, id=f"{name}: {' '.join(words)}")
        if name != "CHANGELOG.md":  # which names commands, not lines
            for one in SAID.finditer(BLOCK.sub("", text).replace("\\\n", " ")):
                for words in commands((one[1] or one[2]).replace("\n", " ")):
                    yield pytest.param(words, False, id=f"{name}: {' '.join(words)}")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder like that of a user who has done what the lines before say."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "experiment.toml").write_text(EXPERIMENT)
    hosts = (ROOT / "examples" / "served" / "hosts.toml").read_text()
    (folder / "hosts.toml").write_text(f'server = "n0"\n{hosts}')
    for number in (1, 2):
        offbeat.run(
            "logistic:digits", "shuffled", "4 1..4", stop={"steps": 50, "gradients": 60},
            folder=folder / "runs" / f"run-00{number}",
        )  # fmt: skip
    return folder


@pytest.fixture
def call(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "200")

    def call(words):
        monkeypatch.setattr(sys, "argv", ["offbeat", *words])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        said = capsys.readouterr()
        assert code == 0, f"{said.out}\n{said.err}"
        return said.out.strip()

    return call


def command_of(words):
    """The command that ``words`` name, and what it is given."""
    command = typer.main.get_command(cli.app)
    while hasattr(command, "commands") and words and words[0].islower():
        assert words[0] in command.commands, f"offbeat has no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    return command, words


def read(words):
    command, words = command_of(words)
    for value in command.make_context(command.name, list(words)).params.values():
        if isinstance(value, Path) and value.parts[0] == "examples":
            assert (ROOT / value).exists()


def run(words, call, monkeypatch):
    made = []  # other processes are for tests of their own: here, it is what is wanted of them
    if there := not {"ray", "zmq"} & set(words):
        words = [*words, "--set", "stop.gradients=30"]
    else:
        monkeypatch.setattr(cli, "go_on", lambda *parts, **more: made.append(parts))
    call(words)
    assert len(made) == (not there)


def with_keys(words):
    """What the lines before have made, whichever ran before this one."""
    if words[1] == "new":
        shutil.rmtree("keys", ignore_errors=True)
        return
    for name in ("server", "w1"):
        if not Path("keys", name).exists():
            keys.new(Path("keys", name), name)


def script(words):
    """A script that is there, and the options of it that are given."""
    source = (ROOT / words[0]).read_text()
    ast.parse(source)
    for option in words[1:]:
        if option.startswith("--"):  # which typer makes of a parameter's name
            assert re.search(rf"\b{option[2:].replace('-', '_')}\b", source)


@pytest.mark.parametrize(("words", "whole"), list(found()))
def test_a_line_of_the_docs(words, whole, call, monkeypatch):
    program, *rest = words
    if program == "offbeat" and whole:
        if rest[0] == "keys":
            with_keys(rest)
        rest = [
            re.sub(r"\$\(offbeat (.*)\)", lambda inner: call(shlex.split(inner[1])), word)
            for word in rest
        ]
        rest = [word.replace("runs/...", "runs/run-001") for word in rest]
        if rest[0] == "run":
            run(rest, call, monkeypatch)
        elif rest[0] in RUNNING and Path(rest[1]).name != "a":  # which is of a run on Ray
            call(rest)
        else:
            assert rest[0] in READ | {"whatif"}, f"no test runs offbeat {rest[0]}"
            read(rest)
    elif program == "offbeat":
        said_of(rest)
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "python":
        script(rest)
    else:
        assert words[:2] in (["git", "clone"], ["cd", "offbeat"], ["source", ".venv/bin/activate"])


def said_of(words):
    """A command in a sentence, which may leave words out, or have some to be filled in."""
    command, words = command_of(words)
    known = {name for one in command.params for name in one.opts} | {"--help"}
    if not hasattr(command, "commands"):
        assert {word for word in words if word.startswith("--")} <= known


def test_lines_are_found():
    lines = [" ".join(one.values[0]) for one in found()]
    assert len(lines) > 40
    assert "offbeat keys show w1 --keys keys/w1" not in lines  # it is in another one
    assert any(line.startswith("offbeat run --task least-squares") for line in lines)
    assert any("$(offbeat keys show w1 --keys keys/w1)" in line for line in lines)
    assert "offbeat topology ring:16" in lines


@pytest.mark.parametrize(
    "text", ["offbeat runn x.toml", "offbeat run --algoritm pure", "python benchmarks/nothing.py"]
)
def test_a_line_that_is_wrong_fails(text, call, monkeypatch):
    with pytest.raises((AssertionError, FileNotFoundError, KeyError)):
        test_a_line_of_the_docs(text.split(), True, call, monkeypatch)
