"""Workers or peers on this machine: one process loads what they need, and forks them.

``python -m offbeat.runtime.on_zeromq.local HEAVY worker ENDPOINT COUNT KEYS``, or ``... peer
FOLDER``, is that process; it imports what is HEAVY first.  It ends, and all it began with it,
when its standard input does: whatever happens to who asked for them, nothing is left behind.
"""

import ctypes
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from logging import getLogger
from pathlib import Path

from offbeat.runtime.base import logs
from offbeat.runtime.base.errors import OffbeatError
from offbeat.runtime.transport.nursery import END_S

log = getLogger("offbeat.net")
MOST_RESTARTS = 10  # of each place
PAUSE_S = 0.2  # between a death and the next try
PR_SET_PDEATHSIG = 1


def _follow_parent() -> None:
    """Have this process killed when its parent dies."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _begin(run: Callable[[str], object], name: str) -> int:
    """Fork a process that is to ``run`` as ``name``; answers its pid."""
    parent = os.getpid()
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.setpgid(0, 0)  # Ctrl-C is for the server, which says when it is over
        _follow_parent()
        os.close(0)
        if os.getppid() != parent:
            os._exit(1)
        logs.identify(node=name)
        run(name)
        code = 0
    except OffbeatError as error:
        code = error.exit_code
        if logs.in_json():
            logs.tell("failed", str(error), logging.ERROR, exit_code=code)
        else:
            print(f"offbeat: {name}: {error}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        logging.exception("%s ends", name)
    finally:
        os._exit(code)


def _workers(endpoint: str, count: str, keys: str) -> tuple[list[str], Callable[[str], object]]:
    import offbeat.runtime.experiment.experiment  # noqa: F401 - loaded once, for all
    from offbeat.runtime.on_zeromq.worker import Worker

    def run(name: str) -> None:
        Worker(endpoint, name, Path(keys) if keys else None).run()

    return [f"local-{i}" for i in range(int(count))], run


def _peers(folder: str) -> tuple[list[str], Callable[[str], object]]:
    from offbeat.runtime.on_zeromq.gossip import planned

    return planned(Path(folder))


def main() -> None:
    """Keep as many processes as were asked for, until standard input ends."""
    heavy, what, *words = sys.argv[1:]
    _follow_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for name in filter(None, heavy.split(",")):
        __import__(name)
    if logs.in_json():
        logs.as_json()
    else:
        logging.basicConfig(level="WARNING", format="%(message)s")
    names, run = _workers(*words) if what == "worker" else _peers(*words)
    pids = {_begin(run, name): name for name in names}
    again_s: dict[str, float] = {}  # when to replace
    restarts = dict.fromkeys(names, 0)
    code = 0
    while pids or again_s:
        if select.select([0], [], [], PAUSE_S / 2)[0] and not os.read(0, 1):
            break
        while pids:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            name, code = pids.pop(pid), os.waitstatus_to_exitcode(status)
            if code > 0 and code != 1:  # it said why; another would say the same
                restarts[name] = MOST_RESTARTS
            if code != 0 and restarts[name] < MOST_RESTARTS:
                again_s[name] = time.monotonic() + PAUSE_S
        for name in [name for name, when_s in again_s.items() if time.monotonic() >= when_s]:
            del again_s[name]
            restarts[name] += 1
            pids[_begin(run, name)] = name
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    end_s = time.monotonic() + END_S
    while pids and time.monotonic() < end_s:
        pid, _ = os.waitpid(-1, os.WNOHANG)
        pids.pop(pid, None)
        if not pid:
            time.sleep(0.01)
    sys.exit(code if not pids else 0)  # those that are left are killed as this process ends


if __name__ == "__main__":
    main()
