"""What has to be alike at all peers of a run, and where each of them is reached."""

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import NamedTuple

from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.base.registry import MADE_BY_HAND
from offbeat.runtime.experiment import files
from offbeat.runtime.experiment.checks import of_peers, refuse
from offbeat.runtime.experiment.experiment import Experiment
from offbeat.workers.tasks.external import External

COMMON = (
    *("seed", "mode", "replicas", "pace"),
    *("task", "algorithm", "fleet", "topology", "work", "stop"),
)


class PeerAddress(NamedTuple):
    """A node of the run: its name, and where it is reached."""

    name: str
    endpoint: str


def lines(experiment: Experiment, seats: Sequence[PeerAddress]) -> str:
    """What has to be alike at all peers, a line a setting.

    Raises:
        ConfigError: the task cannot be made from text, or no such run can be.
    """
    for key in ("task", "work"):
        spec = getattr(experiment, key).spec
        if spec is None or not spec.portable():
            raise ConfigError(
                f"the {key} was made by hand ({MADE_BY_HAND}...), and peers elsewhere could not "
                "make it again; register it, and give its name"
            )
    table = files.rewritten(experiment.table(), files.content)  # which may lie elsewhere there
    found = {f"offbeat {version('offbeat')}": None}
    for key in COMMON:
        said = files.flat(table.get(key), key)
        found |= {f"{where} = {value}": None for where, value in said if value is not None}
    task, x = experiment.task, experiment.task.initial(experiment.seed)
    begins = f", beginning as {task.digest()}" if isinstance(task, External) else ""
    found |= dict.fromkeys(
        [f"model {x.dtype}[{x.size}]{begins}", "nodes " + " ".join(s.name for s in seats)]
    )
    return "\n".join(found)


def check(experiment: Experiment) -> None:
    """Raise ConfigError where peers cannot run ``experiment`` by themselves."""
    refuse(of_peers(experiment))


def alone(experiment: Experiment) -> Experiment:
    """``experiment`` as a peer runs it."""
    from offbeat.runtime.experiment.engines import zmq as made

    return replace(experiment, engine=made(), clock="real")
