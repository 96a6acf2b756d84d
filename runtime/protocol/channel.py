"""One end of a link: what is sent is repeated until acknowledged, and passed on once, in order.

It knows no socket and no clock.  The transport calls ``send`` to queue, ``out`` for what is to be
put on the wire now, ``receive`` for what came.  A link is between one incarnation of either side;
where one is replaced, so is the link.
"""

from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")
WINDOW = 64  # messages on their way at most, and held at most for one that is missing
MOST_QUEUED = 2**16  # messages waiting for the window
RESEND_MOST = 16  # times the first time to wait, at most
ACK_SHARE = 4  # a quarter of the window not acknowledged: say so without waiting


class Full(RuntimeError):
    """More is queued than a link holds: whoever sends has to wait for the other side."""


class ReliableChannel(Generic[T]):
    """Both directions of a link, seen from one end.

    Args:
        resend_s: seconds without an acknowledgement after which the oldest message is sent again
            (doubled each time); longer where round trips were seen to be longer.
        ack_s: seconds an acknowledgement may wait for a message to travel with.
        window: see ``WINDOW``.
        most: see ``MOST_QUEUED``.

    >>> a, b = ReliableChannel(resend_s=1.0), ReliableChannel(resend_s=1.0)
    >>> a.send("x")
    >>> [(sequence, item)] = a.out(0.0)
    >>> b.receive(sequence, item, 0.0), b.receive(sequence, item, 0.0)  # twice: passed on once
    (['x'], [])
    >>> a.out(0.5), a.out(1.5)
    ([], [(1, 'x')])
    >>> a.acknowledge(b.acknowledged, 2.0)
    >>> a.pending
    0
    """

    def __init__(
        self, *, resend_s: float, ack_s: float = 0.05, window: int = WINDOW, most: int = MOST_QUEUED
    ) -> None:
        self.window, self._most, self._share = window, most, window // ACK_SHARE
        self._first_s, self._ack_s = resend_s, ack_s
        self._queue: deque[T] = deque()
        # Out: [acknowledged..sent] are in flight, with the time of their first sending.
        self._flight: deque[tuple[T, float, bool]] = deque()  # (item, when, sent again)
        self._base = 0  # what the other side has
        self._wait_s = self._round_s = resend_s
        self._smooth_s: float | None = None
        self._vary_s = 0.0
        self._again_s = 0.0  # when the oldest is due again,
        self._burst = 1  # and how many with it
        # In.
        self.acknowledged = 0  # passed on without a gap
        self._early: dict[int, T] = {}
        self._owed = 0  # messages that came since the last acknowledgement
        self._owed_since_s = 0.0
        self.resends = self.duplicates = self.beyond = 0

    @property
    def pending(self) -> int:
        """Messages that the other side has not acknowledged."""
        return len(self._flight) + len(self._queue)

    @property
    def held(self) -> int:
        """Messages that came too early and wait for one that is missing."""
        return len(self._early)

    @property
    def urgent(self) -> bool:
        """Whether there is something to put on the wire that should not wait for a tick."""
        return (
            self._owed >= self._share
            or self._burst > 1
            or (bool(self._queue) and len(self._flight) < self.window)
        )

    def send(self, item: T) -> None:
        """Queue ``item``.

        Raises:
            Full: the queue is at its limit.
        """
        if len(self._queue) >= self._most:
            raise Full(f"{self._most} messages wait for the other side")
        self._queue.append(item)

    def out(self, now_s: float) -> list[tuple[int, T]]:
        """What is to be put on the wire now, with its sequence; each carries ``acknowledged``."""
        due: list[tuple[int, T]] = []
        flight = self._flight
        if flight and now_s >= self._again_s:
            for place in range(min(self._burst, len(flight))):
                item, when, _ = flight[place]
                flight[place] = item, when, True
                due.append((self._base + 1 + place, item))
            self.resends += len(due)
            self._burst = 1
            self._wait_s = min(2 * self._wait_s, RESEND_MOST * self._round_s)
            self._again_s = now_s + self._wait_s
        while self._queue and len(flight) < self.window:
            if not flight:
                self._again_s = now_s + self._wait_s
            item = self._queue.popleft()
            flight.append((item, now_s, False))
            due.append((self._base + len(flight), item))
        if due:
            self._owed = 0
        return due

    @property
    def queued(self) -> int:
        """Messages that wait for the window."""
        return len(self._queue)

    def due_s(self) -> float:
        """When ``out`` or ``owes`` has something new to say, if nothing comes before."""
        again_s = self._again_s if self._flight else float("inf")
        owed_s = self._owed_since_s + self._ack_s if self._owed else float("inf")
        return min(again_s, owed_s)

    def lost(self, now_s: float) -> None:
        """What is in flight was lost, all of it maybe: send it again, now."""
        self._again_s, self._burst = now_s, max(1, len(self._flight))

    def owes(self, now_s: float) -> bool:
        """Whether an acknowledgement has to travel now, alone; asking counts as sending it."""
        if not self._owed:
            return False
        if self._owed < self._share and now_s < self._owed_since_s + self._ack_s:
            return False
        self._owed = 0
        return True

    def acknowledge(self, acknowledged: int, now_s: float) -> None:
        """The other side has everything up to ``acknowledged``."""
        count = acknowledged - self._base
        if not 0 < count <= len(self._flight):
            return  # old, or of what was never sent
        again = False  # of these, one was sent again: nobody knows which copy is acknowledged
        for _ in range(count):
            _, when, twice = self._flight.popleft()
            again = again or twice
        self._base = acknowledged
        if not again:
            self._measure(now_s - when)
        self._wait_s = self._round_s
        self._again_s = now_s + self._wait_s
        if self._flight and again and not self._flight[0][2]:
            # What follows was lost with what came before it: send twice as much again, now.
            self._again_s, self._burst = now_s, min(2 * count, self.window)

    def _measure(self, trip_s: float) -> None:
        """Time to wait for an acknowledgement, from what it took (RFC 6298)."""
        if self._smooth_s is None:
            self._smooth_s, self._vary_s = trip_s, trip_s / 2
        else:
            self._vary_s += (abs(trip_s - self._smooth_s) - self._vary_s) / 4
            self._smooth_s += (trip_s - self._smooth_s) / 8
        self._round_s = max(self._first_s, self._smooth_s + 4 * self._vary_s)

    def receive(self, sequence: int, item: T, now_s: float) -> list[T]:
        """What can be passed on, in order, now that ``item`` came."""
        if not self._owed:
            self._owed_since_s = now_s
        self._owed += 1
        ahead = sequence - self.acknowledged
        if ahead == 1:
            self.acknowledged = sequence
            passed = [item]
            while self._early and self.acknowledged + 1 in self._early:
                self.acknowledged += 1
                passed.append(self._early.pop(self.acknowledged))
            return passed
        if ahead <= 0 or sequence in self._early:
            self.duplicates += 1
        elif ahead > self.window:
            self.beyond += 1
        else:
            self._early[sequence] = item
        return []
