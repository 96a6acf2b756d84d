"""Processes on this machine that end with who asked for them."""

import subprocess
import sys

from offbeat.runtime.base.errors import ComputeError

PROGRAM = "offbeat.runtime.on_zeromq.local"  # what begins them
END_S = 5.0  # for processes to end by themselves


class Nursery:
    """The process that has them, seen from who asked for it.

    Args:
        words: "worker", the endpoint of the server, how many (they are called local-0, local-1,
            ...) and the folder of keys, or ""; or "peer" and the folder with their plan.
    """

    def __init__(self, *words: str) -> None:
        heavy = [name for name in ("torch", "sklearn") if name in sys.modules]
        program = [sys.executable, "-m", PROGRAM, ",".join(heavy)]
        self._what = words[0]
        self._process = subprocess.Popen([*program, *words], stdin=subprocess.PIPE)

    def check(self) -> None:
        """Raise ComputeError if it is not there any more."""
        if (code := self._process.poll()) is not None:
            raise ComputeError(
                f"the {self._what}s on this machine do not stay (exit code {code}); they said why "
                "above"
            )

    def close(self) -> None:
        """End it, and its workers."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(2 * END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()  # its workers die with it
            self._process.wait()
