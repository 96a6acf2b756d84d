"""Any benchmark, of this checkout beside another revision's: medians and their ratio, cell by cell.

``python benchmarks/against.py REVISION virtual_engine.py --quick``: the revision is laid out in a
temporary folder, with its own package and its own benchmark (this one's, where it has none), and
the two programs run in turn.  What is compared are the figures that both print.  Words behind the
benchmark are handed to it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from common import where

HERE = Path(__file__).parent
ROOT_FILE = "runtime/root.py"  # what `import offbeat` gives


def lay_out(revision: str, into: Path) -> Path:
    """``revision``'s files under ``into``; answers the folder to import its package from."""
    archive = subprocess.run(
        ["git", "archive", revision], cwd=HERE.parent, stdout=subprocess.PIPE, check=True
    )
    into.mkdir()
    subprocess.run(["tar", "-x", "-C", into], input=archive.stdout, check=True)
    project = tomllib.loads((into / "pyproject.toml").read_text())
    sources = project["tool"]["hatch"]["build"]["targets"]["wheel"]["sources"]
    for source, target in {**sources, ROOT_FILE: "offbeat/__init__.py"}.items():
        link = into / "import" / target
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(into / source)
    return into / "import"


def figures(tree: Path, imports: Path, benchmark: str, words: list[str]) -> dict[str, float]:
    """What one run of a tree's benchmark prints."""
    environment = {**os.environ, "PYTHONPATH": str(imports)}
    program = tree / "benchmarks" / benchmark
    command = [sys.executable, str(program if program.exists() else HERE / benchmark), *words]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=tree)
    try:
        found = json.loads(run.stdout.splitlines()[-1])["figures"]
    except (IndexError, ValueError, KeyError):
        raise SystemExit(f"{benchmark} in {tree} printed no figures:\n{run.stdout}") from None
    rows = {key: value if isinstance(value, dict) else {"": value} for key, value in found.items()}
    flat = {f"{key} {name}".strip(): v for key, row in rows.items() for name, v in row.items()}
    return {key: value for key, value in flat.items() if isinstance(value, int | float)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("revision", help="commit, tag or branch to compare with")
    parser.add_argument("benchmark", help="a file of benchmarks/")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each")
    args, words = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        trees = [Path(temporary, "there"), Path(temporary, "here")]
        imports = [lay_out(args.revision, trees[0]), lay_out("HEAD", trees[1])]
        runs: list[list[dict[str, float]]] = [[], []]
        for number in range(args.rounds):
            for side in (0, 1) if number % 2 else (1, 0):  # neither is always the second
                made = figures(trees[side], imports[side], args.benchmark, words)
                runs[side].append(made)
    print(where())
    print(f"{args.benchmark}: medians of {args.rounds}; {args.revision}, HEAD, HEAD / it")
    for key in runs[1][0]:
        if all(key in run for side in runs for run in side):
            there, here = (statistics.median(run[key] for run in side) for side in runs)
            spread = max(abs(run[key] - here) for run in runs[1])
            ratio = here / there if there else float("nan")
            print(f"{key:48} {there:12.4g} {here:12.4g} {ratio:6.2f}   (within {spread:.2g})")


if __name__ == "__main__":
    main()
