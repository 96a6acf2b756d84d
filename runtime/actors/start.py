"""Ray: started quietly and only when asked for, and stopped by who started it."""

import logging
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

from offbeat.runtime.errors import ConfigError

OLDEST = 2, 40
# What Ray prints of its own accord; a run says it better.
NOISE = "A worker died or was killed|PYTHON worker processes have been started"
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


def start(address: str = "local") -> Callable[[], None]:
    """Have Ray running in this process; answers what stops all that this call began.

    A Ray that the process has already is used, and left running.  Else "local" begins one of its
    own; any other address joins a cluster, and brings this package to its machines.

    Raises:
        ConfigError: Ray is missing, too old or broken; there is no such cluster.
    """
    ray = load()
    if ray.is_initialized():
        return lambda: None
    if address == "local":
        return _begin(ray)
    import offbeat

    try:
        ray.init(address, runtime_env={"py_modules": [offbeat]}, **_quiet())
    except Exception as error:  # Ray has no one type for it
        raise ConfigError(
            f'engine = "ray": cannot join a cluster at "{address}" ({_line(error)}); '
            'address = "local" begins one'
        ) from None
    return ray.shutdown


def _begin(ray: ModuleType) -> Callable[[], None]:
    """A Ray of this process alone, in a folder of its own."""
    if os.environ.get("RAY_ADDRESS"):
        log.warning('RAY_ADDRESS is not followed; engine = "ray(address=auto)" would')
    folder = tempfile.mkdtemp(prefix="offbeat-ray-", dir="/tmp")  # its sockets need a short path

    def stop() -> None:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)

    try:
        with _environment("RAY_USAGE_STATS_ENABLED", "0"):
            ray.init("local", include_dashboard=False, _temp_dir=folder, **_quiet())
    except BaseException as error:
        stop()
        if not isinstance(error, Exception):
            raise
        raise ConfigError(f'engine = "ray": Ray does not start ({_line(error)})') from None
    return stop


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
