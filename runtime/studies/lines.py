"""The file of a study's finished cells: a line each, with its digest."""

import fcntl
import os
from pathlib import Path
from time import monotonic
from typing import Any, BinaryIO

from offbeat.runtime.base.errors import ConfigError, StorageError
from offbeat.runtime.studies import cell

CELLS = "cells.jsonl"
SYNC_S = 2.0  # between two times that results are forced to the disk

Line = dict[str, Any]  # see ``cell.run``
Done = dict[str, Line]  # by cell


def read_cells(folder: Path) -> Done:
    """What is done, by cell; a last line that was torn by a power cut does not count."""
    done: Done = {}
    try:
        with (folder / CELLS).open("rb") as file:
            for number, text in enumerate(file, start=1):
                if text.endswith(b"\n"):
                    try:
                        line = cell.decode(text)
                        done[line["cell"]] = line
                    except (ValueError, KeyError, TypeError):
                        raise StorageError(
                            f"{folder / CELLS} line {number}: is not what was written; remove the "
                            "line, and its cell is run again"
                        ) from None
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise StorageError(f"{folder / CELLS}: cannot be read ({error.strerror})") from None
    return done


class CellsFile:
    """The file of finished cells: a line each, forced to the disk every two seconds."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / CELLS
        self._synced_s = monotonic()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = self.path.open("a+b")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with its process
            self._cut()
        except BlockingIOError:
            self._file.close()
            raise ConfigError(
                f"{folder}: a study is running in it; wait, or give another"
            ) from None
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written ({error.strerror})") from None

    def _cut(self) -> None:
        """Remove a torn last line."""
        end = self._file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 2**16)
            self._file.seek(start)
            at = self._file.read(end - start).rfind(b"\n")
            end = start + at + 1 if at >= 0 else start
            if at >= 0:
                break
        self._file.truncate(end)

    def add(self, line: bytes) -> None:
        """Append a finished cell."""
        try:
            self._file.write(line)
            self._file.flush()
            if monotonic() - self._synced_s > SYNC_S:
                self.sync()
        except OSError as error:
            raise StorageError(
                f"{self.path}: cannot be written ({error.strerror}); what is in it stays: make "
                "room, then run the study again"
            ) from None

    def sync(self) -> None:
        """Force it to the disk."""
        os.fsync(self._file.fileno())
        self._synced_s = monotonic()

    def close(self) -> None:
        """The end."""
        self.sync()
        self._file.close()
