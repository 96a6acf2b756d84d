"""A process's right to a run folder: one at a time has it, and each knows all before it."""

import fcntl
import json
import os
import uuid
from pathlib import Path
from typing import Any

from offbeat.runtime.base.errors import Fenced, StorageError, passes
from offbeat.runtime.run.checkpoint import write_whole


class Claim:
    """One server's right to a run folder: a lock, and an incarnation above all before it.

    Args:
        folder: of the run; None: it is in memory, and nobody else's.
        role: of the process, after which the files are called.

    Raises:
        Fenced: another server has it.
    """

    def __init__(self, folder: Path | None, role: str = "server") -> None:
        self.folder, self.run, self.incarnation = folder, uuid.uuid4().hex[:16], 1
        self._lock: int | None = None
        if folder is None:
            return
        try:
            self._lock = os.open(
                folder / f"{role}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644
            )
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise Fenced(f"{folder}: another {role} runs it; stop that one first") from None
        except OSError as error:
            raise StorageError(f"{folder}: cannot be written ({error.strerror})") from None
        self._path = folder / f"{role}.json"
        try:
            if (before := self._read()) is not None:
                self.run, self.incarnation = before["run"], before["incarnation"] + 1
            self.take(self.incarnation)
        except BaseException:
            self.close()
            raise

    def take(self, incarnation: int) -> None:
        """Be this one from now on."""
        self.incarnation = incarnation
        if self.folder is None:
            return
        mine = {"run": self.run, "incarnation": incarnation}
        try:
            write_whole(self._path, json.dumps(mine).encode())
        except OSError as error:
            self.close()
            raise StorageError(f"{self._path}: cannot be written ({error.strerror})") from None

    def _read(self) -> dict[str, Any] | None:
        try:
            state = json.loads(self._path.read_bytes())
            return {"run": str(state["run"]), "incarnation": int(state["incarnation"])}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{self._path}: cannot be read ({error})") from None

    def check(self, *, surely: bool = True) -> None:
        """Raise Fenced if another server has taken the folder over, where locks do not reach.

        Unless it has to be known ``surely``, it may be left to the next look.
        """
        if self.folder is None:
            return
        try:
            now = self._read()
        except StorageError as error:
            if surely or not passes(error):
                raise
            return
        if now is None or now["incarnation"] != self.incarnation:
            raise Fenced(f"{self.folder}: another server has taken this run over; this one ends")

    def close(self) -> None:
        """Give the folder up; may be called twice."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
