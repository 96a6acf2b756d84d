"""A training loop as one node of a gossip run: its peer is in a thread of its own."""

import json
import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from offbeat.runtime.base import shapes
from offbeat.runtime.base.errors import ConfigError, StorageError
from offbeat.runtime.compute.backend import JobResult
from offbeat.runtime.compute.flat import Flat, fit
from offbeat.runtime.compute.source import JobSource, log
from offbeat.runtime.experiment.experiment import Experiment
from offbeat.runtime.node.effects import Compute
from offbeat.runtime.node.make import request
from offbeat.runtime.on_zeromq.alike import PeerAddress
from offbeat.runtime.on_zeromq.peer import PeerProcess
from offbeat.runtime.run import checkpoint
from offbeat.workers.work import OwnLoop


class LoopPeer(PeerProcess):
    """A peer whose jobs a loop computes, in the same process.

    Args:
        desk: of the loop.
        peer: see ``PeerProcess``.
    """

    def __init__(self, desk: JobSource, *args: Any, **peer: Any) -> None:
        self.elsewhere = self._give
        self._desk = desk
        super().__init__(*args, **peer)

    def _give(self, i: int, job: Compute) -> None:
        self._desk.put(request(i, job, self.experiment.work.steps))

    def take(self, answer: JobResult) -> None:
        """What came of the job at hand."""
        assert self.hosted is not None
        losses = [] if answer.loss is None else [answer.loss]
        self.hosted.computed(self.me, answer.serial, losses, answer.payload)

    def attend(self) -> None:
        """Take part until the run is over, in a thread that is not the process's first."""
        failure = None
        try:
            self._work()
        except BaseException as error:  # it is the loop's to hear of
            failure = error
        try:
            self.close()
        finally:
            self._desk.end(failure)

    def part(self) -> None:
        """Leave the run, after the event at hand."""
        self.leaving = True

    def heard_s(self) -> float:
        """When any neighbour was last heard."""
        return max((n.heard_s for n in self.mesh.neighbours.values()), default=math.inf)


class LoopSource(JobSource):
    """The source of a loop that is a node.

    Args:
        experiment: what all run, with the engine that peers have.
        seats, me, folder, options: see ``PeerProcess``.
        flat: the loop's parameters.

    Raises:
        ConfigError: the run is not one of loops, or the model is another than the run's.
        and what ``PeerProcess`` raises.
    """

    def __init__(
        self,
        experiment: Experiment,
        seats: Sequence[PeerAddress],
        me: int,
        folder: Path,
        flat: Flat,
        **options: Any,
    ) -> None:
        super().__init__(self._take)
        self.name = seats[me].name
        if not isinstance(experiment.work, OwnLoop):
            raise ConfigError(
                'for a training loop of your own the run needs work = "own-loop(steps=50)", not '
                f'work = "{experiment.work.spec}"'
            )
        fit(experiment, flat.shapes, flat.values())
        self._over = _finished(experiment, folder)
        self._peer = LoopPeer(self, experiment, seats, me, folder, **options)
        self._thread = threading.Thread(target=self._peer.attend, name="peer", daemon=True)
        try:
            checkpoint.write_whole(folder / shapes.FILE, shapes.write(flat.shapes).encode())
        except OSError as error:
            self._peer.close()
            raise StorageError(f"{folder}: cannot be written ({error.strerror})") from None

    def start(self) -> None:
        if self._over:
            log.warning("%s", self._over)
            self.end()
        else:
            self._thread.start()

    def _take(self, answer: JobResult) -> None:
        self._peer.take(answer)

    def _awaited(self, began_s: float, now_s: float) -> tuple[str, float]:
        heard_s = self._peer.heard_s()
        silent = now_s - heard_s > self._peer.liveness.down_after_s
        return f"the neighbours of {self.name}", now_s - max(began_s, heard_s) if silent else 0.0

    def leave(self, why: str) -> None:
        """See ``Source``: with a checkpoint, from which the node goes on when it is back."""
        self._peer.part()
        if self._thread.is_alive():
            self._thread.join()
        self._peer.close()


def _finished(experiment: Experiment, folder: Path) -> str:
    """What a node is told that was in the run to its end; "" for others."""
    try:
        told = json.loads((folder / "summary.json").read_text())
    except OSError:
        return ""
    if told["reason"] != "steps" or told["round"] < (experiment.stop.steps or math.inf):
        return ""
    return f"the run in {folder} is over: its {told['round']} rounds are done"
