"""Who is there, and who has which job: at most one answer to a job counts.

Like a link, it knows no socket and no clock.  One setting, ``suspect_after_s``, is what all times
are derived from.
"""

from collections import Counter, deque
from dataclasses import dataclass, field

from offbeat.runtime.base.errors import OldIncarnation, StaleJob, UnknownJob, WrongNode
from offbeat.runtime.experiment.engines import Liveness
from offbeat.runtime.protocol.channel import WINDOW

MOST_OFFENCES = 10  # messages that cannot be right, before a node is cut off
MOST_WRONG = 2 * WINDOW  # in a row, of what an honest node may have on its way as well
GRAVE = MOST_WRONG // MOST_OFFENCES  # as many of those are as bad as one that cannot be right
MOST_STRIKES = 3  # results in a row that are not finite
RESTARTS_S = 120.0  # the window in which restarts are counted,
FREE_RESTARTS = 3  # after so many of which a node has to wait,
BUILD_S = 60.0  # silence that is allowed while a task is built: imports let nothing else run
WAIT_MOST_S = 32.0  # twice as long each time, up to this,
MOST_RESTARTS = 9  # and with so many it is shut out
MOST_NONCES = 32  # processes of a node that are remembered


@dataclass(eq=False)
class Member:
    """A process that takes part.

    ``nonce`` tells a repeated greeting from that of a new process of the same node.
    """

    node: str
    slot: int
    nonce: int
    incarnation: int
    heard_s: float
    excused: bool = False  # since it was heard: this side was away
    spoke: bool = False  # since it was welcomed
    ready: bool = False  # it has built its task
    offences: int = 0
    strikes: int = 0  # results in a row that were not finite
    jobs: set[int] = field(default_factory=set)


class NotNow(Exception):
    """A node cannot join at this moment.

    Args:
        why: said to it.
        retry_s: when to ask again; None: never.
        replaced: another process of the node has taken its place.
    """

    def __init__(self, why: str, retry_s: float | None, replaced: bool = False) -> None:
        super().__init__(why)
        self.why, self.retry_s, self.replaced = why, retry_s, replaced


class Roster:
    """Membership: who has which slot, under which incarnation, and was heard when.

    Args:
        slots: workers of the run; a process that joins takes a free one, its last if it can.
        liveness: times.
    """

    def __init__(self, slots: int, liveness: Liveness) -> None:
        self.liveness, self.slots = liveness, slots
        self.members: dict[str, Member] = {}
        self.quarantined: dict[str, str] = {}  # node -> why
        self._incarnations: dict[str, int] = {}  # the highest one of every node that was here
        self._nonces: dict[str, deque[int]] = {}  # of its processes, the last one last
        self._slots: dict[str, int] = {}  # where it was
        self._joins: dict[str, deque[float]] = {}
        self._looked_s: float | None = None

    def hello(self, node: str, nonce: int, now_s: float) -> Member:
        """``node`` as a member.

        A process that is here is not replaced while it is heard: of two under one name the second
        waits, and so does one that restarted sooner than its predecessor was found dead.

        Raises:
            NotNow: it is shut out, restarts too often, or there is no place.
        """
        if why := self.quarantined.get(node):
            raise NotNow(why, None)
        member = self.members.get(node)
        if nonce in list(self._nonces.get(node, ()))[:-1]:  # late words, or a process that slept
            raise NotNow(f"another process joined as {node}", None, replaced=True)
        if member is not None:
            if member.nonce != nonce:
                raise NotNow(f"another process is here as {node}", self.liveness.heartbeat_s)
            member.heard_s, member.excused = now_s, False
            return member  # it did not hear the answer
        if len(self.members) >= self.slots:
            raise NotNow(f"all {self.slots} places are taken", self.liveness.down_after_s)
        nonces = self._nonces.setdefault(node, deque(maxlen=MOST_NONCES))
        self._joins.setdefault(node, deque(maxlen=MOST_RESTARTS))
        if nonce not in nonces:
            self._throttle(node, now_s)
        incarnation = self._incarnations[node] = self._incarnations.get(node, 0) + 1
        slot = self._slots[node] = self._free(node)
        member = self.members[node] = Member(node, slot, nonce, incarnation, now_s)
        return member

    def heard(self, member: Member, now_s: float) -> None:
        """``member`` speaks; only now it is certain that its greeting was not a dead one's."""
        member.heard_s, member.excused = now_s, False
        if not member.spoke:
            member.spoke = True
            nonces = self._nonces[member.node]
            if member.nonce not in nonces:
                nonces.append(member.nonce)
                self._joins[member.node].append(now_s)

    def _throttle(self, node: str, now_s: float) -> None:
        """Have a node whose processes keep dying wait, and then no more."""
        joins = self._joins[node]
        while joins and joins[0] < now_s - RESTARTS_S:
            joins.popleft()
        if len(joins) >= MOST_RESTARTS:
            self.quarantined[node] = (
                f"{node} is shut out: it restarted {MOST_RESTARTS} times in {RESTARTS_S:.0f} s"
            )
            raise NotNow(self.quarantined[node], None)
        if (many := len(joins) - FREE_RESTARTS) > 0:
            wait_s = joins[-1] + min(2.0 ** (many - 1), WAIT_MOST_S) - now_s
            if wait_s > 0:
                raise NotNow(f"{node} restarts too often", wait_s)

    def _free(self, node: str) -> int:
        taken = {member.slot for member in self.members.values()}
        last = self._slots.get(node)
        if last is not None and last not in taken:
            return last
        # One that nobody will want back, if there is one.
        free = [slot for slot in range(self.slots) if slot not in taken]
        once = set(self._slots.values())
        return min(free, key=lambda slot: (slot in once, slot))

    def find(self, node: str, incarnation: int) -> Member:
        """The member that speaks.

        Raises:
            OldIncarnation: it is not a member, or not any more.
        """
        member = self.members.get(node)
        if member is None or member.incarnation != incarnation:
            raise OldIncarnation(f"{node} is not here as incarnation {incarnation}")
        return member

    def replaced(self, node: str, incarnation: int) -> bool:
        """Whether another process of ``node`` joined after the one that speaks."""
        member = self.members.get(node)
        return member is not None and member.spoke and member.incarnation > incarnation

    def suspects(self, member: Member, now_s: float) -> bool:
        """Whether ``member`` has been silent for too long to be given work."""
        return now_s - member.heard_s > self.liveness.suspect_after_s

    def drop(self, member: Member) -> None:
        """``member`` is not here any more; nothing it says counts until it joins again."""
        if self.members.get(member.node) is member:
            del self.members[member.node]

    def quarantine(self, member: Member, why: str) -> None:
        """Drop ``member`` for good."""
        self.quarantined[member.node] = why
        self.drop(member)

    def silent(self, now_s: float) -> list[Member]:
        """Members to be declared dead.

        Where this side itself was away (a long evaluation, a stopped process), what was not heard
        meanwhile is nobody's fault; but who is not heard either when it is back, is not there,
        though it may always be away.
        """
        looked_s, self._looked_s = self._looked_s, now_s
        if looked_s is not None and (away_s := now_s - looked_s) > 2 * self.liveness.heartbeat_s:
            for member in self.members.values():
                if not member.excused:
                    member.heard_s = max(member.heard_s, min(now_s, member.heard_s + away_s))
                    member.excused = True
        down_s = self.liveness.down_after_s
        building_s = max(down_s, BUILD_S)
        return [
            member
            for member in self.members.values()
            if now_s - member.heard_s
            > (building_s if member.spoke and not member.ready else down_s)
        ]


class JobBook:
    """The job table: a result counts if its job is out with the node that sends it, and once.

    assigned = accepted + taken back + outstanding, always.
    """

    def __init__(self) -> None:
        self.outstanding: dict[int, tuple[int, Member]] = {}  # job -> order's serial, who has it
        self._jobs: dict[int, int] = {}  # serial -> its job
        self.counts: Counter[str] = Counter()
        self.assigned = 0

    def assign(self, serial: int, member: Member) -> int:
        """The number of a new job for order ``serial``, which replaces the one it had."""
        if serial in self._jobs:
            self.cancel(serial)
        self.assigned += 1
        job = self.assigned
        self.outstanding[job] = serial, member
        self._jobs[serial] = job
        member.jobs.add(job)
        return job

    def accept(self, member: Member, job: int) -> int:
        """The serial of the order that ``job`` was for; it is done.

        Raises:
            UnknownJob, StaleJob, WrongNode.
        """
        if not 0 < job <= self.assigned:
            raise UnknownJob(f"{member.node} answers job {job}, which was never handed out")
        if job not in self.outstanding:
            raise StaleJob(f"{member.node} answers job {job}, which is done or was taken back")
        serial, owner = self.outstanding[job]
        if owner is not member:
            raise WrongNode(f"{member.node} answers job {job}, which {owner.node} has")
        self._remove(job)
        self.counts["accepted"] += 1
        return serial

    def cancel(self, serial: int) -> tuple[int, Member] | None:
        """Take back order ``serial``; answers its job and who had it."""
        job = self._jobs.get(serial)
        if job is None:
            return None
        _, member = self.outstanding[job]
        self._remove(job)
        self.counts["taken back"] += 1
        return job, member

    def release(self, member: Member) -> list[int]:
        """Take back all that ``member`` has; answers the serials."""
        serials = sorted(self.outstanding[job][0] for job in member.jobs)
        for serial in serials:
            self.cancel(serial)
        return serials

    def _remove(self, job: int) -> None:
        serial, member = self.outstanding.pop(job)
        del self._jobs[serial]
        member.jobs.discard(job)
