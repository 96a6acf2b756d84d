"""What a process tells of itself: sentences, or with ``--log json`` one object a line.

An object has the time (UTC), level, event, run, node and incarnation of who tells, the sentence as
"message", and the fields of its event; what is no event, such as a library's warning, is a "log".
"""

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, NamedTuple

from offbeat.runtime.base.errors import ConfigError, OffbeatError, nearest

FORM = "OFFBEAT_LOG"  # the environment's word on it, also for processes begun from here
FORMS = ("text", "json")
EVENTS = {
    "listens": "a server or a peer can be reached; endpoint",
    "metrics": "metrics can be read; endpoint",
    "waiting": "it cannot go on without others; here: who is there",
    "joined": "a worker takes part; member, worker, where; at the worker: server, worker",
    "left": "a worker said goodbye; member, worker, jobs, why",
    "gone": "a worker is not there any more, or was shut out; member, worker, jobs, why",
    "refused": "somebody may not join; member, why",
    "rejected": "a message cannot be right; member, reason (as counters call it), why",
    "cut": "a connection was ended; address, why",
    "key_refused": "keys that are not listed, or none; count; at a peer: neighbour",
    "key_revoked": "a key is not in the list any more; member",
    "raised": "the code of a worker's task; member, job, why",
    "begins": "a peer's node begins; how (start, restore, join), neighbours",
    "up": "a peer hears a neighbour; neighbour",
    "down": "a peer does not hear a neighbour any more; neighbour",
    "differs": "a neighbour runs another experiment; why",
    "saved": "a checkpoint is on the disk; step",
    "save_failed": "it is not; failed, most (in a row, before the run ends), why",
    "resumed": "the run goes on from a checkpoint; step, skipped (damaged ones), lost (results)",
    "ended": "the process is done; reason",
    "failed": "the process ends with an error; exit_code",
}
FIRST_S = 1.0  # of waiting, until it is said for what,
REMIND_S = 30.0  # and then every so often
OFTEN = {"refused", "rejected", "cut", "key_refused", "raised"}  # what others cause, at any rate
EVERY_S = 1.0  # between two sentences of such a kind
log = logging.getLogger("offbeat.net")
_who: dict[str, str | int | None] = {"run": None, "node": None, "incarnation": None}


def at_terminal() -> bool:
    """Whether standard output is one; of a daemon it may be closed."""
    return sys.stdout is not None and sys.stdout.isatty()


class Note(NamedTuple):
    """Something to be told, by what has no log of its own."""

    event: str
    text: str
    fields: Mapping[str, Any] = {}
    level: int = logging.INFO


def tell(event: str, text: str, level: int = logging.INFO, **fields: Any) -> None:
    """Log the sentence ``text``, which is about ``event``, one of ``EVENTS``."""
    assert event in EVENTS, event
    log.log(level, "%s", text, extra={"event": event, "fields": fields})


class Seldom:
    """Tells the first of each kind at once, and then in one sentence a second how many there were.

    A kind is an event of ``OFTEN``, and its reason; all other events are told as they come.
    """

    def __init__(self) -> None:
        # When the next may be told, how many were not, and the last of those.
        self._held: dict[tuple[str, Any], tuple[float, int, Note]] = {}

    def tell(self, event: str, text: str, level: int = logging.INFO, **fields: Any) -> None:
        """Tell it now, or count it; see ``tell``."""
        if event not in OFTEN:
            tell(event, text, level, **fields)
            return
        kind, now_s = (event, fields.get("reason")), time.monotonic()
        next_s, missed, _ = self._held.get(kind, (now_s, 0, None))
        note = Note(event, text, fields, level)
        if now_s < next_s:
            self._held[kind] = next_s, missed + 1, note
            return
        self._held[kind] = now_s + EVERY_S, 0, note
        if missed:
            text, fields = f"{text} (and {missed} more like it)", {**fields, "more": missed}
        tell(event, text, level, **fields)

    def remind(self) -> None:
        """Tell of those that were counted, where it is time."""
        now_s = time.monotonic()
        for kind, (next_s, missed, note) in list(self._held.items()):
            if now_s < next_s:
                continue
            del self._held[kind]
            if missed:
                self._held[kind] = now_s, missed - 1, note
                self.tell(note.event, note.text, note.level, **note.fields)


def identify(**who: str | int | None) -> None:
    """Say who this process is: run, node, incarnation."""
    assert who.keys() <= _who.keys()
    _who.update(who)


class Lines(logging.Formatter):
    """Records as JSON, one a line."""

    def format(self, record: logging.LogRecord) -> str:
        """One object."""
        row: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", "log"),
            **_who,
            **getattr(record, "fields", {}),
            "message": record.getMessage(),
        }
        if record.exc_info:
            row["traceback"] = self.formatException(record.exc_info)
        return json.dumps(row)


def as_json() -> None:
    """Log as JSON on standard error from now on."""
    handler = logging.StreamHandler()
    handler.setFormatter(Lines())
    logging.basicConfig(level="WARNING", handlers=[handler], force=True)


def in_json() -> bool:
    """Whether the environment wants that."""
    return os.environ.get(FORM) == "json"


@contextmanager
def telling(form: str) -> Iterator[None]:
    """Log in one of ``FORMS``, in JSON also the error that ends what is done meanwhile.

    Raises:
        SystemExit: in JSON, with that error's exit code.
    """
    if form not in FORMS:
        raise ConfigError(f'--log: there is no "{form}"{nearest(form, FORMS)}')
    ours, root = logging.getLogger("offbeat"), logging.getLogger()
    level, handlers, said = ours.level, root.handlers[:], os.environ.get(FORM)
    ours.setLevel("INFO")
    try:
        if form == "json":
            root.handlers.clear()  # else they would be closed
            as_json()
            os.environ[FORM] = form
        yield
    except OffbeatError as error:
        if form == "text":
            raise
        tell("failed", str(error), logging.ERROR, exit_code=error.exit_code)
        raise SystemExit(error.exit_code) from None
    finally:
        ours.setLevel(level)
        root.handlers[:] = handlers
        os.environ.pop(FORM, None)
        if said is not None:
            os.environ[FORM] = said
