"""Gossip in one process as actors have it: messages, reports and orders come from other threads."""

import queue
import threading
import time

from offbeat.runtime.experiment.engines import ENGINES
from offbeat.runtime.gossip.driver import GossipDriver, Slot
from offbeat.runtime.gossip.hosted import NodeLoop


class Seat(Slot):
    """Some nodes, a thread that brings their mail, and one that takes their reports."""

    here = True

    def __init__(self, nodes):
        super().__init__(nodes)
        self.mail = queue.SimpleQueue()
        self.threads = []


class Threaded(GossipDriver):
    """A run whose processes are threads."""

    def __init__(self, experiment, records, *, actors, watch_s, **around):
        n = experiment.task.workers
        seats = [Seat(list(range(first, n, actors))) for first in range(actors)]
        super().__init__(experiment, seats, records, **around)
        self._of = {i: seat for seat in seats for i in seat.nodes}
        self._watch_s, self._ended, self._reports = watch_s, False, queue.Queue()

    def _launch(self, states, now_s):
        for seat in self._seats:
            mine = None if states is None else {i: states[i] for i in seat.nodes}
            seat.hosted = NodeLoop(self.experiment, seat.nodes, self._carry, states=mine)
        self._zero_s = time.monotonic() - now_s * self.experiment.pace
        for seat in self._seats:
            seat.hosted.begin(now_s, self._limit)
            for work in (self._bring, self._watch):
                seat.threads.append(threading.Thread(target=work, args=(seat,), daemon=True))
                seat.threads[-1].start()
        self._rest()

    def _carry(self, parcels):
        for seat in {
            id(seat): seat for seat in map(self._of.get, [p.to for p in parcels])
        }.values():
            seat.mail.put([p for p in parcels if p.to in seat.nodes])

    def _bring(self, seat):
        while (parcels := seat.mail.get()) is not None:
            seat.hosted.bring(parcels)

    def _watch(self, seat):
        while not self._ended:
            self._reports.put((seat, seat.hosted.report(self._watch_s)))

    def _listen(self, timeout_s):
        try:
            self._take(*self._reports.get(timeout=timeout_s))
            while not self._reports.empty():
                self._take(*self._reports.get())
        except queue.Empty:
            pass
        self._arrive()

    def _ask(self, what):
        self._questions += 1
        question = self._questions
        for seat in self._seats:
            seat.hosted.ask(question, what)
        self._await(lambda: all(question in seat.answers for seat in self._seats), "answer")
        return {i: x for seat in self._seats for i, x in seat.answers.pop(question).items()}

    def _tell(self, seats, what, each):
        for seat in seats:
            for argument in each:
                seat.hosted.tell(what, argument)

    def close(self):
        self._ended = True
        for seat in self._seats:
            seat.mail.put(None)
            if seat.threads:
                seat.hosted.end(2.0)


class Threads:
    """The engine of it; ``loop`` is its last run."""

    def __init__(self, actors=2, watch_s=0.1, kind=Threaded):
        self.made = ENGINES["ray"]()
        self.spec, self.clocks, self.backend = self.made.spec, self.made.clocks, self.made.backend
        self._more, self._kind = {"actors": actors, "watch_s": watch_s}, kind

    def gossip(self, experiment, records, **around):
        self.loop = self._kind(experiment, records, **self._more, **around)
        return self.loop
