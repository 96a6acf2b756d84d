"""What a server holds of one member beside its place in the roster."""

import math
from typing import Any

from numpy.typing import NDArray

from offbeat.runtime.protocol.channel import ReliableChannel
from offbeat.runtime.protocol.roster import Member
from offbeat.runtime.protocol.wire import Assembly


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
