"""Checkpoints: one safetensors file each, with the state's tree as JSON in its header.

Written under a temporary name, fsynced, renamed, the folder fsynced; the newest few are kept.
Loading takes the newest whose digest is right and says which it skipped.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from offbeat.runtime.base import trees
from offbeat.runtime.base.errors import StorageError, passes
from offbeat.runtime.base.logs import tell

FORMAT = "offbeat checkpoint 2"
KEPT = 2
SOONER = 30  # the first wait for a save is so much shorter than the last,
SHARE = 0.01  # if saves then take no more than this of the time
PARTIAL = ".partial"


def write(folder: Path, number: int, state: dict[str, Any]) -> None:
    """Write ``state`` as checkpoint ``number``; raises OSError, and then nothing has changed."""
    arrays: dict[str, NDArray] = {}
    tree = json.dumps(trees.split(state, arrays))
    header = {"format": FORMAT, "state": tree, "digest": _digest(tree, arrays)}
    data = save(arrays, header)
    folder.mkdir(parents=True, exist_ok=True)
    for torn in folder.glob(f"*{PARTIAL}"):  # of a process that was killed
        torn.unlink()
    write_whole(folder / _name(number), data)
    for old in _newest_first(folder)[KEPT:]:
        old.unlink()


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that, whatever happens, there is all of it or what was there before."""
    temporary = path.with_name(path.name + PARTIAL)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


class Attempts:
    """When to save, and failed saves in a row, of which a run bears so many.

    The first wait is short, and each is twice the one before it, up to ``every_s``; a save that
    takes long is waited for longer.

    Args:
        most: with how many failed saves it ends.
        every_s: seconds between saves, in the long run.
    """

    def __init__(self, most: int, every_s: float) -> None:
        self.most, self.failed = most, 0
        self.every_s, self.wait_s = every_s, every_s / SOONER

    @contextmanager
    def bear(self) -> Iterator[None]:
        """Save in this; raises StorageError where it was the last attempt."""
        began_s = time.monotonic()
        try:
            yield
        except StorageError as error:
            self.failed += not passes(error)
            if self.failed >= self.most:
                raise
            text = f"failed save {self.failed} of {self.most} in a row, the run goes on: {error}"
            tell("save_failed", text, ERROR, failed=self.failed, most=self.most, why=str(error))
        else:
            self.failed = 0
        finally:
            took_s = time.monotonic() - began_s
            self.wait_s = min(self.every_s, max(2 * self.wait_s, took_s / SHARE))


def exist(folder: Path) -> bool:
    """Whether ``folder`` has a checkpoint, good or not."""
    return bool(_newest_first(folder))


def read(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The newest good state, and a sentence for each newer checkpoint that had to be skipped."""
    skipped: list[str] = []
    for path in _newest_first(folder):
        try:
            return _read_one(path), skipped
        except (ValueError, KeyError, TypeError, OSError, SafetensorError, RecursionError) as error:
            skipped.append(f"skipped {path}: {error}")
    found = "; ".join(skipped) or "there is none"
    raise StorageError(f"{folder}: no readable checkpoint ({found})")


def _read_one(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="numpy") as file:
        header = file.metadata() or {}
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if header.get("format") != FORMAT:
        raise ValueError(f"its format is {header.get('format')!r}, not {FORMAT!r}")
    if header["digest"] != _digest(header["state"], arrays):
        raise ValueError("its digest is wrong")
    state = trees.fill(json.loads(header["state"]), arrays)
    if not isinstance(state, dict):
        raise ValueError("it holds no state")
    return state


def _name(number: int) -> str:
    return f"{number:012d}.safetensors"


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"), reverse=True)


def _digest(tree: str, arrays: dict[str, NDArray]) -> str:
    digest = hashlib.blake2b(tree.encode(), digest_size=16)
    for key in sorted(arrays):
        digest.update(f"{key} {arrays[key].dtype} {arrays[key].shape}".encode())
        digest.update(np.asarray(arrays[key], order="C").data)
    return digest.hexdigest()
