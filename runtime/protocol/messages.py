"""What a server and its workers say to each other."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated

from msgspec import Meta, Struct
from numpy.typing import NDArray

from offbeat.runtime.protocol.wire import ArraySpec, Counter, Kind, Name
from offbeat.workers.compressed import SENT
from offbeat.workers.work import Kept

MOST_TEXT = 2**17
KEPT = "kept."  # before the names of what a worker keeps between jobs

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
