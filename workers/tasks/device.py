"""Where a task computes, and the devices that are there.

``placed`` is for any task.  A task that torch computes has ``apart``: whether it keeps models
elsewhere than numpy does.  Where it does, ``task.load`` takes a vector there, and its ``gradient``
answers tensors of that device with tensors that stay there.
"""

import re
from typing import Any

from offbeat.runtime.base.errors import ConfigError
from offbeat.workers.tasks.contract import Task

DEVICE = re.compile(r"cpu(:0)?|cuda(:\d{1,2})?")


def found(name: str) -> Any:
    """The ``torch.device`` called ``name``.

    Raises:
        ConfigError: it is none, or not there.

    >>> found("gpu")
    Traceback (most recent call last):
    ...
    offbeat.ConfigError: "gpu" is no device; give cpu, cuda or cuda:0
    """
    import torch

    if not DEVICE.fullmatch(name):
        raise ConfigError(f'"{name}" is no device; give cpu, cuda or cuda:0')
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name.startswith("cuda") and int(name[5:] or 0) >= count:
        sees = f"cuda:0 to cuda:{count - 1}" if count else "no GPU"
        raise ConfigError(f'device "{name}" is not there; torch sees {sees}')
    return torch.device(name)


def check(task: Task, name: str, here: bool = False) -> None:
    """Raise ConfigError where ``task`` cannot compute on device ``name``, which may be elsewhere.

    Args:
        task: which.
        name: of the device.
        here: it has to be on this machine.
    """
    if name == "cpu":
        return
    if not hasattr(task, "to"):
        called = task.spec.name if task.spec is not None else type(task).__name__
        raise ConfigError(
            f'{called} is computed by numpy, on the CPU; on device "{name}" can be computed lm, '
            "and any TorchTask"
        )
    if here:
        found(name)


def placed(task: Task, name: str) -> Any:
    """``task``, computing on device ``name`` from now on; "cpu": where it does anyway."""
    check(task, name)
    return task if name == "cpu" else task.to(name)  # type: ignore[attr-defined]
