"""What a peer process does beside taking part: it keeps its records, or does what a driver says."""

import json
import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from logging import WARNING
from typing import Any

import numpy as np

from offbeat.runtime.base import trees
from offbeat.runtime.base.errors import ComputeError, StorageError
from offbeat.runtime.base.logs import Note, tell
from offbeat.runtime.experiment.checks import of_peers, refuse
from offbeat.runtime.experiment.experiment import Experiment
from offbeat.runtime.gossip.hosted import NodeLoop, NodeReport
from offbeat.runtime.node.make import gossip_node
from offbeat.runtime.protocol import messages as say
from offbeat.runtime.protocol.wire import PIECE_BYTES
from offbeat.runtime.run import checkpoint
from offbeat.runtime.run.records import Records
from offbeat.workers.tasks.contract import guarded

LEAVE_S = 10.0  # for the node's state, once the process is asked to end
FAREWELL_S = 0.5  # for the last words to be on their way
MOST_WATCHERS = 16  # whose reports are on their way at a time


class PeerPolicy:
    """See the module.

    Args:
        peer: the process, a ``PeerProcess``.
    """

    linger_ms = 0  # how long words that are not sent yet outlive the process

    def __init__(self, peer: Any) -> None:
        self.peer, self.experiment = peer, peer.experiment
        self.records = Records(self.experiment.fleet, self.folder, self.experiment.record.trace)

    @staticmethod
    def check(experiment: Experiment) -> None:
        """Raise ConfigError where it cannot do with ``experiment``."""

    @property
    def folder(self) -> Any:
        """Of the records; None: they are somebody else's."""
        return None

    def begin(self, state: dict[str, Any] | None) -> None:
        """The node is about to begin, from a checkpoint's ``state`` or anew."""

    def begun(self) -> None:
        """The node has begun."""

    def look(self, hosted: NodeLoop, now_s: float) -> None:
        """What is not urgent."""

    def watched(self, address: bytes, node: str, body: say.Watch) -> None:
        """``node`` wants to drive this peer."""
        raise NotImplementedError

    def reached(self, hosted: NodeLoop, now_s: float) -> str | None:
        """Why the peer ends, if it does."""
        return None

    def end(self, hosted: NodeLoop, reason: str) -> None:
        """The peer ends, as ``Result.reason`` says."""

    def facts(self) -> dict[str, Any]:
        """What ``offbeat status`` is told."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of everything."""
        self.records.close()


class Driven(PeerPolicy):
    """A driver says how far the node may go, and takes its reports."""

    def __init__(self, peer: Any) -> None:
        super().__init__(peer)
        self._replies: dict[bytes, tuple[str, int, bytes]] = {}  # watcher -> its last answer

    def watched(self, address: bytes, node: str, body: say.Watch) -> None:
        peer, last = self.peer, self._replies.get(address)
        if last is None or last[1] != body.question:
            for what, *args in json.loads(body.commands):
                if what == "extend":
                    peer.limit = args[0]
                    if peer.hosted is not None:
                        peer.hosted.tell("extend", args[0])
                elif what == "ask" and peer.hosted is not None:
                    peer.hosted.ask(*args)
            if len(self._replies) >= MOST_WATCHERS:
                self._replies.clear()
            last = node, body.question, trees.dumps(trees.dump(self._report()))
            self._replies[address] = last
        data = np.frombuffer(last[2], np.uint8)
        for at in range(0, len(data), PIECE_BYTES):
            part = data[at : at + PIECE_BYTES]
            told = say.Told(body.question, at, at + len(part) == len(data))
            peer.parts.append((address, peer.packed("told", told, {"part": part})))

    def _report(self) -> dict[str, Any]:
        """What happened since the last report."""
        peer = self.peer
        told = NodeReport() if peer.hosted is None else peer.hosted.report(0.0)
        peer.mesh.round = told.rounds.get(self.peer.me, peer.mesh.round)
        fields = dict(vars(told))
        error = fields.pop("error")
        fields["error"] = None if error is None else [getattr(error[0], "__name__", ""), error[1]]
        fields["rows"] = np.array(told.rows, float).reshape(-1, 7)
        return fields | {"incarnation": peer.mesh.incarnation, "began": peer.hosted is not None}

    def facts(self) -> dict[str, Any]:
        return {"loss": None, "bytes": 0, "jobs": 0, "spent_s": [0.0, 0]}


class Keeping(PeerPolicy):
    """The peer keeps its own records and checkpoints, and ends by itself."""

    linger_ms = round(1000 * FAREWELL_S)

    def __init__(self, peer: Any) -> None:
        super().__init__(peer)
        self._identity = self.experiment.identity()
        peer.limit = self.experiment.stop.steps or math.inf
        self._side = ThreadPoolExecutor(1)  # evaluates and saves
        self._report = NodeReport()
        self._spent = 0.0, 0  # seconds, jobs
        record = self.experiment.record
        self._saves = checkpoint.Attempts(record.max_failed_saves, record.save_every_s)
        self._saving: Future[None] | None = None
        self._save_s = time.monotonic()
        self._evaluating: Future[dict[str, Any]] | None = None
        self._newest: tuple[int, int, float, Any] | None = None  # model that is to be, next
        self._last: dict[str, Any] = {}  # metrics

    @staticmethod
    def check(experiment: Experiment) -> None:
        refuse(of_peers(experiment))

    @property
    def folder(self) -> Any:
        return self.peer.folder

    def begin(self, state: dict[str, Any] | None) -> None:
        if state is not None:
            self.records.restore(state["records"])
        else:
            self.records.begin()

    def begun(self) -> None:
        self.peer.write_text("experiment.toml", self.experiment.toml())
        self._save_s = time.monotonic()

    def watched(self, address: bytes, node: str, body: say.Watch) -> None:
        why = f"{node} would watch this peer, which nobody does"
        fields = {"member": node, "reason": "unknown_kind", "why": why}
        self.peer.mesh.notes.append(Note("rejected", why, fields))

    def look(self, hosted: NodeLoop, now_s: float) -> None:
        self._keep(hosted.report(0.0))
        if now_s - self._save_s >= self._saves.wait_s and not self._saving:
            self._save_s = now_s
            hosted.ask(0, "state")

    def _keep(self, told: NodeReport) -> None:
        """Write down what happened."""
        if told.error is not None:
            kind, said = told.error
            raise (kind or ComputeError)(said)
        self._report = told
        self.peer.mesh.round = told.rounds.get(self.peer.me, 0)
        self.records.rows += told.rows
        spent_s, jobs = self._spent
        self._spent = spent_s + sum(row[6] - row[5] for row in told.rows), jobs + len(told.rows)
        for loss in told.losses:
            self.experiment.task.report(loss)
        if told.inputs and self.experiment.record.trace:
            self.records.note({"inputs": told.inputs})
        if self._saving is not None and self._saving.done():
            saved, self._saving = self._saving, None
            with self._saves.bear():
                saved.result()
        if 0 in told.answers:
            try:
                self._saving = self._side.submit(self._write, self._whole(told.answers[0]))
            except StorageError as error:
                self._saving = Future()
                self._saving.set_exception(error)
        if self._evaluating is not None and self._evaluating.done():
            self._last = self._evaluating.result()
            self.records.add(self._last)
            self._evaluating = None
        if told.models:
            self._newest = told.models[-1]  # those before it are too many for this machine
        if self._newest is not None and self._evaluating is None:
            (k, _, time_s, x), self._newest = self._newest, None
            self._evaluating = self._side.submit(self._evaluate, k, time_s, x)

    def _evaluate(self, k: int, time_s: float, x: Any) -> dict[str, Any]:
        counts = self._counts()
        row = {"time_s": time_s, "step": k, "gradients": k * self.experiment.work.steps}
        return row | guarded(self.experiment.task).evaluate(x) | {"bytes": counts.get("bytes", 0)}

    def _whole(self, answer: Any) -> dict[str, Any]:
        return {
            "node": answer[self.peer.me],
            "step": self.peer.mesh.round,
            "gradients": self.peer.mesh.round * self.experiment.work.steps,
            "time_s": self.peer.hosted.now_s(),
            "records": self.records.state(),
            "experiment": self._identity,
        }

    def _write(self, state: dict[str, Any]) -> None:
        node = gossip_node(self.experiment, self.peer.me)
        node.limit = 0  # it is only looked at
        node.restore(state["node"]["node"])
        state["x"] = self.experiment.task.initial(0) if node.joining else node.model
        try:
            checkpoint.write(self.peer.folder / "checkpoint", state["records"]["flushed"], state)
            step = state["step"]
            tell("saved", f"{self.peer.seat.name} saved a checkpoint of round {step}", step=step)
        except OSError as error:
            raise StorageError(
                f"{self.peer.folder / 'checkpoint'}: cannot be written ({error.strerror}); the "
                "last checkpoint is intact: make room or mend the rights, then start the peer again"
            ) from None

    def reached(self, hosted: NodeLoop, now_s: float) -> str | None:
        peer, stop = self.peer, self.experiment.stop
        if stop.wall_s is not None and now_s - peer.began_s >= stop.wall_s:
            return "wall time"
        if stop.seconds is not None and hosted.now_s() >= stop.seconds:
            return "seconds"
        done = self._report.rests and peer.mesh.round >= peer.limit
        if peer.mesh.standing == say.RUNNING and done:
            peer.mesh.leave(say.DONE, now_s)
        busy = peer.mail or self._evaluating is not None  # the last round's model is looked at
        if peer.mesh.standing == say.DONE and peer.mesh.finished(now_s) and not busy:
            return "steps"
        return None

    def end(self, hosted: NodeLoop, reason: str) -> None:
        self._last_state(hosted)
        said = {"reason": reason, "round": self.peer.mesh.round, **self._last}
        said |= {"counts": {**self._counts(), **self.peer.mesh.counts}}
        self.peer.write_text("summary.json", json.dumps(said, indent=1) + "\n")

    def _last_state(self, hosted: NodeLoop) -> None:
        """Write the last checkpoint."""
        if self._saving is not None:
            self._saving.exception()  # whatever came of it: the state is saved once more
        self._saving = None
        hosted.ask(1, "state")
        end_s = time.monotonic() + LEAVE_S
        while time.monotonic() < end_s:
            told = hosted.report(0.1)
            told.answers.pop(0, None)  # of a save that was due: this one is newer
            self._keep(told)
            if 1 in told.answers:
                self._write(self._whole(told.answers[1]))
                return
            self.peer.mesh.tick(time.monotonic())
            self.peer.send()
        why = "its job takes too long; the checkpoint is an older one"
        text = f"{self.peer.seat.name}: {why}"
        tell("save_failed", text, WARNING, failed=1, most=1, why=why)

    def _counts(self) -> dict[str, int]:
        return self._report.counts.get(self.peer.me, {})

    def facts(self) -> dict[str, Any]:
        loss = self._last.get("loss", math.nan)
        return {
            "loss": loss if math.isfinite(loss) else None,  # JSON has no other numbers
            "bytes": self._counts().get("bytes", 0),
            "jobs": self._spent[1],
            "spent_s": list(self._spent),
        }

    def close(self) -> None:
        self._side.shutdown()
        super().close()
