"""What a server and its workers say to each other, and what peers do."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated

from msgspec import Meta, Struct
from numpy.typing import NDArray

from offbeat.runtime.protocol.wire import MOST_ARRAYS, PIECE_BYTES, ArraySpec, Counter, Kind, Name
from offbeat.runtime.protocol.wire import Counter as Natural
from offbeat.workers.compressed import SENT
from offbeat.workers.work import Kept

MOST_TEXT = 2**17
KEPT = "kept."  # before the names of what a worker keeps between jobs

GATHERING, SAVED, RUNNING, DONE, LEFT = range(5)  # how far a peer is
LEAST_ENTRIES = 4  # of an item that is no vector of the model
Text = Annotated[str, Meta(max_length=MOST_TEXT)]
Seconds = Annotated[float, Meta(ge=0, lt=1e9)]


class Hello(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """A worker asks to join; ``nonce`` is of its process, ``where`` that is."""

    nonce: Counter
    package: Name
    where: Name


class Welcome(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """It may: as which incarnation, in whose place, and what to compute."""

    nonce: Counter
    incarnation: Counter
    slot: Counter
    suspect_after_s: float
    experiment: Text
    manifest: Text


class Refusal(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """It may not, at least not now."""

    nonce: Counter
    why: Text
    retry_s: float
    """When to ask again; negative: never."""
    replaced: bool = False
    """Another process has taken its place."""


class Again(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """The server does not know who speaks: it is to say hello."""

    server: Counter = 0
    """The incarnation that was spoken to; 0: of another run."""


class Ready(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """The task is built; ``manifest`` is what it found, ``shapes`` how a loop's model is made."""

    manifest: Text
    shapes: Text = ""


class Pulse(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """Still there; carries an acknowledgement."""


class JobMessage(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """Compute a job; without an array x, at the model of the order before."""

    job: Counter
    shard: Counter
    draw: Counter
    steps: Counter
    step: Counter


class Cancel(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """A job is not wanted any more."""

    job: Counter


class ResultMessage(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """What came of a job."""

    job: Counter
    loss: float | None
    """None: a loop that did not say."""
    spent_s: Seconds


class Failure(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """The task's own code raised."""

    job: Counter
    why: Text


class Leave(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """A worker goes; what it has not answered it hands back."""

    why: Text


class Over(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """The run is at its end, or the server stops."""

    why: Text
    done: bool


class Ask(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """How is the run?"""


class Status(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """It is so; JSON."""

    text: Text


GREETING = {
    "hello": Kind(Hello, stranger=True),
    "welcome": Kind(Welcome, stranger=True),
    "refusal": Kind(Refusal, stranger=True),
    "again": Kind(Again, stranger=True),
    "ask": Kind(Ask, stranger=True),
    "status": Kind(Status, stranger=True),
}


def kinds(x: NDArray, kept: Kept) -> dict[str, Kind]:
    """All that is spoken in a run with models like ``x [d]`` and rows like ``kept``."""
    rows = {
        KEPT + name: ArraySpec(row.dtype.str, (1, *row.shape[1:])) for name, row in kept.items()
    }
    maybe = {name: replace(spec, optional=True) for name, spec in rows.items()}
    rows.pop(KEPT + SENT, None)  # the server knows it from the payload
    model = ArraySpec(x.dtype.str, x.shape)
    return GREETING | {
        "ready": Kind(Ready),
        "pulse": Kind(Pulse),
        "work": Kind(JobMessage, {"x": replace(model, optional=True), **maybe}),
        "cancel": Kind(Cancel),
        "result": Kind(ResultMessage, {"payload": model, **rows}),
        "failure": Kind(Failure),
        "leave": Kind(Leave),
        "over": Kind(Over),
    }


def manifest(kinds: Mapping[str, Kind]) -> str:
    """The arrays of every kind, as text that two sides can compare."""
    return "; ".join(
        f"{kind}.{name} {spec.dtype}{list(spec.shape)}"
        for kind, spoken in kinds.items()
        for name, spec in spoken.arrays.items()
    )


# -- Between peers ---------------------------------------------------------------------------------


class Beat(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """A peer is alive."""

    number: Natural
    """Of the sender's beats."""
    known: Natural
    """The highest session of the addressee that it knows; 0: none."""
    before: Natural
    """The last one of the process before that."""
    hears: bool
    standing: Annotated[int, Meta(ge=GATHERING, le=LEFT)]
    counts: bool
    """Whether it counts on the addressee since it began."""
    round: Natural


class Said(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """What a gossip node sends; array k is item k, and where there is none the item is nothing."""

    what: Name
    number: Annotated[int, Meta(ge=-1, lt=2**53)]
    serial: Natural
    items: Annotated[int, Meta(ge=0, le=MOST_ARRAYS)]


class Config(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """What the sender's run depends on, for one whose run differs."""

    text: Text


class Watch(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """Do what ``commands`` (JSON) says, and report; asked again, the answer is the same."""

    question: Natural
    commands: Text


class Told(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """A piece of a report, which begins ``offset`` bytes into it; ``last`` ends it."""

    question: Natural
    offset: Natural
    last: bool


WATCHING = {
    "watch": Kind(Watch, stranger=True),
    "told": Kind(Told, {"part": ArraySpec("|u1", (PIECE_BYTES,), loose=True)}, stranger=True),
}


def spoken(x: NDArray) -> dict[str, Kind]:
    """All that peers with models like ``x [d]`` say."""
    item = ArraySpec(x.dtype.str, (max(x.size, LEAST_ENTRIES),), optional=True, loose=True)
    items = {str(place): item for place in range(MOST_ARRAYS)}
    return {
        **WATCHING,
        "beat": Kind(Beat, stranger=True),
        "said": Kind(Said, items),
        "config": Kind(Config, stranger=True),
        "ask": GREETING["ask"],
        "status": GREETING["status"],
    }
