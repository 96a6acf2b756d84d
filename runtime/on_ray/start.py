"""Ray: started quietly and only when asked for, and stopped by who started it."""

import fcntl
import logging
import os
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import IO

import psutil

from offbeat.runtime.base.errors import ComputeError, ConfigError
from offbeat.runtime.run.loop import uninterrupted

OLDEST = 2, 40
# What Ray prints of its own accord; a run says it better.
NOISE = "A worker died or was killed|PYTHON worker processes have been|Raylet is terminated"
PROCESSES = {"gcs_server", "raylet"}
REACH_S = 5.0  # for a connection to a cluster
LOOK_S = 1.0  # between looks after them
FOLDER = "offbeat-ray-"  # how those of a Ray are called,
OWNER = "owner"  # and the file in each that its process has locked
log = logging.getLogger("offbeat")


def load() -> ModuleType:
    """Ray, where it is there and new enough."""
    try:
        with _environment("RAY_DEDUP_LOGS_SKIP_REGEX", NOISE):  # read when it is imported
            import ray
    except ImportError as error:
        why = "is not installed" if error.name == "ray" else f"cannot be imported ({error})"
        raise ConfigError(f'engine = "ray": Ray {why}; pip install "ray>=2.40"') from None
    except Exception as error:  # a broken installation can raise anything
        raise ConfigError(
            f'engine = "ray": Ray cannot be imported ({type(error).__name__}: {error}); '
            "install it again"
        ) from None
    version = str(getattr(ray, "__version__", "0"))
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ConfigError(f'engine = "ray" needs Ray {oldest} or newer, not {version}')
    return ray


class Session:
    """Ray in this process, and what has to be stopped of it.

    Args:
        stop: ends what was begun; may be called twice.
        processes: Ray's own, without which it does nothing any more.
    """

    def __init__(self, stop: Callable[[], None], processes: Sequence[psutil.Process] = ()) -> None:
        self.stop, self._processes = stop, processes
        self._next_s = 0.0

    def check(self) -> None:
        """Look after Ray's processes now and then: it says nothing itself for a minute.

        Raises:
            ComputeError: one is gone.
        """
        now_s = time.monotonic()
        if now_s < self._next_s:
            return
        self._next_s = now_s + LOOK_S
        for process in self._processes:
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                raise ComputeError(f"Ray is gone: process {process.pid} of it died")


def start(address: str = "local") -> Session:
    """Have Ray running in this process.

    A Ray that the process has already is used, and left running.  Else "local" begins one of its
    own; any other address joins a cluster, and brings this package to its machines.

    Raises:
        ConfigError: Ray is missing, too old or broken; there is no such cluster.
    """
    ray = load()
    if ray.is_initialized():
        return Session(lambda: None)
    if address == "local":
        return _begin(ray)
    import offbeat

    try:
        _reach(address)
        ray.init(address, runtime_env={"py_modules": [offbeat]}, **_quiet())
    except Exception as error:  # Ray has no one type for it
        raise ConfigError(
            f'engine = "ray": cannot join a cluster at "{address}" ({_line(error)}); '
            'address = "local" begins one'
        ) from None
    return Session(ray.shutdown)


def _reach(address: str) -> None:
    """See whether anybody is at "host:port": Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), REACH_S).close()


def _begin(ray: ModuleType) -> Session:
    """A Ray of this process alone, in a folder of its own."""
    if os.environ.get("RAY_ADDRESS"):
        log.warning('RAY_ADDRESS is not followed; engine = "ray(address=auto)" would')
    folder, owner = own_folder()

    def stop() -> None:
        with uninterrupted():
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)
            owner.close()

    try:
        with _environment("RAY_USAGE_STATS_ENABLED", "0"):
            ray.init("local", include_dashboard=False, _temp_dir=folder, **_quiet())
    except BaseException as error:
        stop()
        if not isinstance(error, Exception):
            raise
        raise ConfigError(f'engine = "ray": Ray does not start ({_line(error)})') from None
    began = [child for child in psutil.Process().children() if child.name() in PROCESSES]
    return Session(stop, began)


def own_folder(among: str = "/tmp") -> tuple[str, IO[bytes]]:
    """A new folder, and the file by whose lock others see that its process lives.

    Those of this user whose process was killed are removed.

    Args:
        among: where they are: Ray's sockets need a short path.
    """
    for left in Path(among).glob(f"{FOLDER}*"):
        _remove(left)
    folder = tempfile.mkdtemp(prefix=FOLDER, dir=among)
    begun = Path(folder) / f"{OWNER}.new"
    owner = begun.open("wb")
    fcntl.flock(owner, fcntl.LOCK_EX)
    begun.rename(begun.with_name(OWNER))  # from now on it can be told whether it is left
    return folder, owner


def _remove(folder: Path) -> None:
    """Remove ``folder``, if it is this user's and nobody's any more."""
    with suppress(OSError):  # it is somebody else's, or in use, or gone by now
        if folder.lstat().st_uid == os.getuid():
            with (folder / OWNER).open("rb") as owner:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)  # which follows no links


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """With a variable set, unless the user has set it."""
    told = name in os.environ
    os.environ.setdefault(name, value)
    try:
        yield
    finally:
        if not told:
            del os.environ[name]


def _quiet() -> dict[str, object]:
    namespace = f"offbeat-{uuid.uuid4().hex[:8]}"
    return {"namespace": namespace, "log_to_driver": False, "logging_level": "ERROR"}


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0]


def last_line(error: Exception) -> str:
    """Of an error's text, which may be a traceback."""
    return str(error).strip().split("\n")[-1]
