"""What a server holds of one member beside its place in the roster, and a peer of a neighbour."""

import math
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from offbeat.runtime.protocol.channel import ReliableChannel
from offbeat.runtime.protocol.messages import GATHERING
from offbeat.runtime.protocol.roster import Member
from offbeat.runtime.protocol.wire import Assembly, Frames, pack, parcels

PROCESS = 2**20  # processes of one incarnation are told apart by a number below this,
RESETS = 2**16  # and each gives a link up less often than that


class Outbox:
    """Messages of one process of a run, packed for their addresses.

    Args:
        run: its name.
        speaker: the node that says them.
        incarnation: of it.
    """

    def __init__(self, run: str, speaker: str, incarnation: int) -> None:
        self.run, self.speaker, self.incarnation = run, speaker, incarnation
        self.outbox: list[tuple[bytes, list[Any]]] = []  # address, frames for it

    def _post(
        self, address: bytes, kind: str, body: Struct, to: int, acknowledged: int = 0
    ) -> None:
        """Send something outside of the order."""
        (parcel,) = parcels(kind, body)
        self.outbox.append((address, self._packed(parcel, to, acknowledged)))

    def _packed(self, parcel: Frames, to: int, acknowledged: int, sequence: int = 0) -> list[Any]:
        return pack(
            parcel,
            run=self.run,
            node=self.speaker,
            incarnation=self.incarnation,
            to=to,
            sequence=sequence,
            acknowledged=acknowledged,
        )


class MemberSlot:
    """A member that is here."""

    def __init__(self, member: Member, address: bytes, link: ReliableChannel, assembly: Assembly):
        self.member, self.address, self.link = member, address, link
        self.assembly = assembly
        self.last: NDArray | None = None  # the model it was sent last
        self.where = ""
        self.jobs = self.nbytes = 0  # results, and bytes of arrays to and fro
        self.staleness, self.loss = 0, float("nan")  # of the last one
        self.rates = 0.0, 0.0  # jobs and bytes a second, lately
        self.before: tuple[float, int, int] = (member.heard_s, 0, 0)  # of which this is the last

    def at(self, address: bytes, now_s: float) -> None:
        """It speaks from ``address``; from another than before, it has connected anew."""
        if address != self.address:
            self.address = address
            self.link.lost(now_s)

    def measure(self, now_s: float) -> None:
        """Take the rates since this was done last."""
        then_s, jobs, nbytes = self.before
        spent_s = max(now_s - then_s, 1e-3)
        self.rates = (self.jobs - jobs) / spent_s, (self.nbytes - nbytes) / spent_s
        self.before = now_s, self.jobs, self.nbytes

    def row(self, *, suspected: bool) -> dict[str, Any]:
        """How it is, for a status."""
        member = self.member
        return {
            "worker": member.slot,
            "node": member.node,
            "where": self.where,
            "state": "building" if not member.ready else "suspected" if suspected else "here",
            "jobs": self.jobs,
            "jobs_s": self.rates[0],
            "bytes_s": self.rates[1],
            "staleness": self.staleness,
            "loss": self.loss if math.isfinite(self.loss) else None,  # JSON has no other numbers
            "waiting": self.link.pending,
        }


class Neighbour:
    """What a peer knows of one."""

    def __init__(self, number: int, name: str, session: int, assembly: Assembly) -> None:
        self.number, self.name, self.mine, self.assembly = number, name, session, assembly
        self.theirs = self.before = 0
        self.heard_s = -np.inf
        self.excused = False  # since then: this side was away
        self.knows = False  # this end's session, and hears it
        self.standing, self.round = GATHERING, 0
        self.counts = False  # on this peer since it began
        self.since = 0  # its session on which this peer counts since it began
        self.up = False
        self.beats = 0  # number of the last one heard
        self.beat_s = -np.inf  # when the next beat is due
        self.address = b""  # from which it speaks
        self.config_s = -np.inf  # when it may be told again that its run differs
        self.offences = 0
        self.link: ReliableChannel = ReliableChannel(resend_s=1.0)


def process(session: int) -> int:
    """What the sessions of one process have in common."""
    return session // RESETS


def incarnation(session: int) -> int:
    """Of whose session it is."""
    return process(session) // PROCESS
