"""The files that an experiment reads: which they are, and what is in them.

An option that names files says so in its annotation (``registry.Reads``), and nowhere else is a
list of such options.  Runs, studies, peers, the doctor and deployments ask here.
"""

import hashlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from offbeat.runtime.base.errors import ConfigError, StorageError
from offbeat.runtime.base.registry import Change, Reads
from offbeat.topologies import TOPOLOGIES
from offbeat.workers.fleet import Fleet
from offbeat.workers.speeds import SPEEDS
from offbeat.workers.tasks import TASKS

PARTS = {"task": TASKS, "topology": TOPOLOGIES}  # beside the fleet's speeds
DIGEST_BYTES = 16


def rewritten(table: Mapping[str, Any], change: Change) -> dict[str, Any]:
    """An experiment's table, in which what names files is as ``change`` has it."""
    made = dict(table)
    for key, registry in PARTS.items():
        if (given := made.get(key)) is None:
            continue
        several = isinstance(given, list)
        found = [registry.rewritten(one, change) for one in (given if several else [given])]
        made[key] = found if several else found[0]
    if "fleet" in made:
        made["fleet"] = _fleet(made["fleet"], change)
    return made


def _fleet(given: Any, change: Change) -> Any:
    table = given
    if isinstance(given, str) and "trace" in given:  # to read others takes long
        try:
            table = {key: value for key, value in vars(Fleet.parse(given)).items() if value}
        except ConfigError:  # who builds it says why
            return given
    if not isinstance(table, Mapping) or not isinstance(before := table.get("speeds"), str):
        return given
    speeds = SPEEDS.rewritten(before, change)
    return given if speeds == before else {**table, "speeds": speeds}


def absolute(text: str, reads: Reads) -> str:
    """``text`` with the whole path; one from a home folder stays, for there are several homes."""
    prefix, path = reads.parts(text)
    return text if path.startswith("~") else f"{prefix}{Path(path).resolve()}"


def content(text: str, reads: Reads) -> str:
    """A digest of the files that ``text`` names: of their bytes, and of several the names there.

    Of one it is the ending, which says how it is read.

    Raises:
        StorageError: one of them cannot be read.
    """
    paths, root = reads.found(text), reads.root(text)
    names = [path.relative_to(root) for path in paths] if len(paths) > 1 else [Path(text).suffix]
    found = [f"{name} {digest(path)}" for name, path in zip(names, paths, strict=False)]
    return hashlib.blake2b("\n".join(found).encode(), digest_size=DIGEST_BYTES).hexdigest()


def digest(path: Path) -> str:
    """Of a file's bytes, which are read again only where the file has changed."""
    try:
        state = path.stat()
        return _digest(path.absolute(), state.st_ino, state.st_size, state.st_mtime_ns)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from None


@lru_cache(maxsize=4096)
def _digest(path: Path, inode: int, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(
            file, lambda: hashlib.blake2b(digest_size=DIGEST_BYTES)
        ).hexdigest()


def named(table: Mapping[str, Any]) -> dict[str, Reads]:
    """The texts in an experiment's table that name files."""
    found: dict[str, Reads] = {}

    def note(text: str, reads: Reads) -> str:
        found[text] = reads
        return text

    rewritten(table, note)
    return found


def contents(table: Mapping[str, Any]) -> dict[str, str]:
    """What is in the files of an experiment's table: [files] of a run's experiment.toml."""
    return {text: content(text, reads) for text, reads in named(table).items()}


def check(table: Mapping[str, Any]) -> None:
    """Raise ConfigError where files hold something else than [files] of the table says."""
    said = table.get("files", {})
    if not isinstance(said, Mapping):
        raise ConfigError(f"files must be a table of paths and digests, not {said!r}")
    for text, reads in named(table).items() if said else ():
        there = text in said and reads.found(text)  # who reads it says that it is not
        if there and content(text, reads) != said[text]:
            raise ConfigError(
                f'"{text}" has other contents than when [files] was written; put them back, or '
                "say that they may differ: offbeat resume --changed, or a file without that line"
            )


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of nested tables, and what is no table.

    >>> dict(flat({"a": {"b": 1}, "c": [2]}))
    {'a.b': 1, 'c': [2]}
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flat(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How two flat tables differ, in words; "" where they do not.

    >>> differences({"seed": 1, "algorithm.lr": 0.1}, {"seed": 2, "algorithm.lr": 0.1})
    'seed is 2, and was 1'
    """
    keys = [key for key in {**was, **now} if was.get(key) != now.get(key)]
    return "; ".join(f"{key} is {now.get(key)}, and was {was.get(key)}" for key in keys)
