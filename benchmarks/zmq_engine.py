"""Messages and bytes a second: server and workers over ZeroMQ beside bare pyzmq loops and gloo.

A job is one exchange: a model goes out, a result of the same size comes back.  Workers compute
nothing and answer with an array they have, so that what is measured is what carries them.

*bare*: a ROUTER that is drained on its descriptor, and DEALERs that answer; large vectors are cut
into pieces of 1 MB which either side copies into a buffer it has, the fastest of the ways tried.
*ours*: the backend and the worker process of ``engine = "zmq"``, with all that they check: headers,
sequence numbers, acknowledgements, job table, finite results.
*gloo*: torch.distributed, two processes that send to each other and wait.
"""

import os
import select
import signal
import socket
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zmq
from common import arguments, finish, where

from offbeat.runtime.compute.backend import Back, JobRequest, JobResult
from offbeat.runtime.experiment.engines import ENGINES
from offbeat.runtime.experiment.experiment import from_table
from offbeat.runtime.on_zeromq import worker
from offbeat.runtime.on_zeromq.server import ZmqBackend
from offbeat.runtime.protocol.messages import kinds
from offbeat.runtime.transport import keys

PIECE = 2**20
LARGE = {"1 MB": 10**6 // 8, "10 MB": 10**7 // 8, "100 MB": 10**8 // 8}  # numbers of 8 bytes
TINY = 2


def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def forked(call: Callable[[], None]) -> int:
    """``call`` in a process of its own; answers the pid."""
    if pid := os.fork():
        return pid
    try:
        call()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def reap(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def warm(n: int, jobs: int) -> int:
    """Jobs that are not timed: until every buffer was used, whose pages are made then."""
    return max(6 * n, jobs // 10)


# -- Bare loops ----------------------------------------------------------------------------------


def dealer(address: str, d: int, own: Any, server: bytes) -> None:
    """Answer every vector with one of the same size, for ever."""
    made = zmq.Context().socket(zmq.DEALER)
    made.sndhwm = made.rcvhwm = 0
    if own is not None:
        keys.as_client(made, own, server)
    made.connect(address)
    buffer, payload = np.empty(d), np.zeros(d)
    made.send(b"here")
    into, out = buffer.data.cast("B"), payload.data.cast("B")
    while True:
        if d * 8 <= PIECE:
            np.copyto(buffer, np.frombuffer(made.recv(copy=False).buffer))
            made.send(out, copy=False)
            continue
        for at in range(0, d * 8, PIECE):
            part = made.recv(copy=False).buffer
            into[at : at + len(part)] = part
        for at in range(0, d * 8, PIECE):
            made.send(out[at : at + PIECE], copy=False)


def bare(n: int, d: int, jobs: int, folder: Path | None) -> float:
    """Jobs a second."""
    address = f"tcp://127.0.0.1:{port()}"
    own = keys.identity(folder, "w") if folder else None
    server = keys.server_key(folder) if folder else b""
    pids = [forked(lambda: dealer(address, d, own, server)) for _ in range(n)]
    context = zmq.Context()
    gate = keys.Gate(context, folder) if folder else None
    router = context.socket(zmq.ROUTER)
    router.sndhwm = router.rcvhwm = 0
    if folder is not None:
        keys.as_server(router, keys.identity(folder, keys.SERVER))
    router.bind(address)
    x, buffer = np.zeros(d), np.empty(d)
    whole, into = x.data.cast("B"), buffer.data.cast("B")
    pieces = max(1, -(-d * 8 // PIECE))

    def give(who: bytes) -> None:
        if pieces == 1:
            router.send_multipart([who, whole], copy=False)
            return
        for at in range(0, d * 8, PIECE):
            router.send_multipart([who, whole[at : at + PIECE]], copy=False)

    here = [router.recv_multipart()[0] for _ in range(n)]
    began_s = 0.0
    got = dict.fromkeys(here, 0)
    done = -warm(n, jobs)
    for who in here:
        give(who)
    descriptor = router.fileno()
    while done < jobs:
        try:
            who = router.recv(zmq.NOBLOCK)
        except zmq.Again:
            if not router.getsockopt(zmq.EVENTS) & zmq.POLLIN:
                select.select([descriptor], [], [])
            continue
        part = router.recv(copy=False).buffer
        at = got[who] * PIECE
        into[at : at + len(part)] = part
        got[who] += 1
        if got[who] == pieces:
            got[who] = 0
            done += 1
            if done == 0:
                began_s = time.perf_counter()
            give(who)
    rate = jobs / (time.perf_counter() - began_s)
    reap(pids)
    if gate is not None:
        gate.close()
    context.destroy(0)
    return rate


# -- Ours ----------------------------------------------------------------------------------------


class Echo:
    """A runner that computes nothing."""

    task = None

    def __init__(self, d: int) -> None:
        self._payload = np.zeros(d)

    def compute(self, orders: list[JobRequest]) -> list[JobResult]:
        return [JobResult(order.serial, 0.0, self._payload, {}, 0.0) for order in orders]


def ours(n: int, d: int, jobs: int, folder: Path | None) -> float:
    """Jobs a second."""
    address = f"tcp://127.0.0.1:{port()}"

    def work(i: int) -> None:
        # In this forked process only: messages are to be timed, not a task.
        worker.built = lambda text, device: (Echo(d), kinds(np.zeros(d), {}))  # type: ignore[assignment]
        worker.Worker(address, f"w{i}" if folder else "", folder).run()

    pids = [forked(lambda i=i: work(i)) for i in range(n)]  # type: ignore[misc]
    table = {"task": f"quadratic({d})", "algorithm": "pure", "fleet": {"workers": n}}
    (experiment,) = from_table(table)
    engine = ENGINES["zmq"](address, keys=str(folder or ""), processes=0)
    backend = ZmqBackend(experiment, engine, None)
    here = 0
    while here < n:
        here += sum(isinstance(event, Back) for event in backend.collect(1.0))
    models = [np.zeros(d) for _ in range(3)]  # a worker is not sent one twice in a row
    serial, done, began_s = 0, -warm(n, jobs), 0.0

    def give(who: int) -> None:
        nonlocal serial
        serial += 1
        backend.submit(JobRequest(serial, who, who, serial, 1, serial, models[serial % 3], None))

    owner = {}
    for who in range(n):
        give(who)
        owner[serial] = who
    while done < jobs:
        for event in backend.collect(1.0):
            assert isinstance(event, JobResult)
            done += 1
            if done == 0:
                began_s = time.perf_counter()
            who = owner.pop(event.serial)
            give(who)
            owner[serial] = who
    rate = jobs / (time.perf_counter() - began_s)
    reap(pids)
    backend.close()
    return rate


def gloo(d: int, jobs: int) -> float:
    """Exchanges a second of two processes."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)  # others would not survive the fork
    store = tempfile.mktemp(prefix="offbeat-gloo-")

    def side(rank: int, count: int) -> float:
        dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
        out, into = torch.zeros(d, dtype=torch.float64), torch.empty(d, dtype=torch.float64)
        began_s = 0.0
        for k in range(-max(1, count // 10), count):
            if k == 0:
                began_s = time.perf_counter()
            sent = dist.isend(out, 1 - rank)
            dist.recv(into, 1 - rank)
            sent.wait()
        spent_s = time.perf_counter() - began_s
        dist.destroy_process_group()
        return count / spent_s

    pid = forked(lambda: print(end="", flush=bool(side(1, jobs))))
    rate = side(0, jobs)
    os.waitpid(pid, 0)
    return rate


def main() -> None:
    """Run it."""
    given = arguments(str(__doc__).split("\n")[0], rounds={"type": int, "default": 3})
    quick, rounds = given.quick, 1 if given.quick else given.rounds
    print(where())
    figures: dict[str, Any] = {}
    targets = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for one in (keys.SERVER, "w", *(f"w{i}" for i in range(16))):
            keys.new(folder, one)
            keys.authorize(folder, one, keys.show(folder, one))
        for secure in (None, folder):
            told = "CURVE" if secure else "plain"
            for n in (2, 8) if quick else (2, 8, 16):
                pairs = [
                    (bare(n, TINY, jobs, secure), ours(n, TINY, jobs, secure))
                    for jobs in [3000 if quick else 30_000] * rounds
                ]
                rates = [statistics.median(column) for column in zip(*pairs, strict=True)]
                ratio = statistics.median(b / a for a, b in pairs)
                figures[f"tiny, {n} workers, {told}"] = [*rates, ratio]
                print(
                    f"tiny, {n:2d} workers, {told}: bare {rates[0]:8,.0f}/s  "
                    f"ours {rates[1]:8,.0f}/s  {ratio:.2f}x",
                    flush=True,
                )
                if n == 8:
                    targets[f"tiny, {told}: 0.6 of bare"] = ratio >= 0.6
            for size, d in LARGE.items():
                if quick and d > LARGE["10 MB"]:
                    continue
                jobs = max(6, (20 if quick else 200) * LARGE["10 MB"] // d // (4 if secure else 1))
                jobs = min(jobs, 1000)
                pairs = [
                    (bare(2, d, jobs, secure), ours(2, d, jobs, secure)) for _ in range(rounds)
                ]
                mb = 2 * d * 8 / 1e6  # there and back
                rates = [mb * statistics.median(column) for column in zip(*pairs, strict=True)]
                ratio = statistics.median(b / a for a, b in pairs)
                figures[f"{size}, {told}"] = [*rates, ratio]
                line = (
                    f"{size:>6}, 2 workers, {told}: bare {rates[0]:6,.0f} MB/s  "
                    f"ours {rates[1]:6,.0f} MB/s  {ratio:.2f}x"
                )
                if d >= LARGE["10 MB"]:
                    targets[f"{size}, {told}: 0.85 of bare"] = ratio >= 0.85
                if secure is None:
                    other = mb * statistics.median(gloo(d, jobs) for _ in range(rounds))
                    figures[f"{size}, gloo"] = other
                    targets[f"{size}: at least gloo"] = rates[1] >= other
                    line += f"  gloo {other:6,.0f} MB/s"
                print(line, flush=True)
    finish(figures, targets)


if __name__ == "__main__":
    main()
