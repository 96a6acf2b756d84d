"""Jobs a second of an honest worker, and a server's memory, while others misbehave.

Server, worker and whoever floods are processes of this machine.  The worker's jobs take 10 ms, so
that its rate shows what the server does, and the server evaluates often, 0.2 s each time, in which
it reads nothing.  Before, beside and after each flood runs one without: its rate is the undisturbed
one, and its model has to be the same to the last bit.  Memory is the most that the server ever had.

Floods are bounded, in bytes and seconds.  *Strangers* have no key, *members* one of their own.
"""

import itertools
import resource
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import zmq
from common import arguments, finish, where
from zmq_engine import forked, port, reap

import offbeat
from offbeat.runtime.on_zeromq import worker
from offbeat.runtime.protocol import messages as say
from offbeat.runtime.protocol.wire import pack, parcels
from offbeat.runtime.transport import keys

JOB_S = 0.01
BUSY_S = 0.2  # of an evaluation
FILES = 1024  # descriptors that the server may have open
MOST_BYTES = 2**30  # that one who floods sends at most,
MOST_S = 60.0  # and so long
MOST_MB = 400.0
MEMBER = "mallory"
Say = Callable[[zmq.Socket], Iterator[int]]


# -- Who floods ----------------------------------------------------------------------------------


def address(endpoint: str) -> tuple[str, int]:
    host, _, number = endpoint.removeprefix("tcp://").rpartition(":")
    return host, int(number)


@contextmanager
def connection(endpoint: str, folder: Path | None) -> Iterator[zmq.Socket]:
    """A member's, or where there are no keys anybody's."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as made:
        made.linger, made.sndhwm, made.sndtimeo, made.immediate = 0, 16, 100, 1
        if folder is not None:
            keys.as_client(made, keys.identity(folder, MEMBER), keys.server_key(folder))
        made.connect(endpoint)
        yield made


def flood(endpoint: str, folder: Path | None, saying: Say) -> None:
    """Say it until it has been enough, over one connection that is begun again where it is cut."""
    sent, end_s = 0, time.monotonic() + MOST_S
    with connection(endpoint, folder) as made:
        while sent < MOST_BYTES and time.monotonic() < end_s:
            with suppress(zmq.Again):
                for nbytes in saying(made):
                    sent += nbytes
                    if sent >= MOST_BYTES:
                        break


def frames(made: zmq.Socket) -> Iterator[int]:
    """A message of 1,500 frames."""
    made.send_multipart([b"frame"] * 1500)
    yield 1500 * 5


def large(made: zmq.Socket) -> Iterator[int]:
    """Large messages, faster than they are read."""
    made.send(bytes(2**20))
    yield 2**20


def unreadable(made: zmq.Socket) -> Iterator[int]:
    """What is no header."""
    made.send(b"no header")
    yield 9


def stale(made: zmq.Socket) -> Iterator[int]:
    """Beats of a process that nobody knows."""
    (parcel,) = parcels("pulse", say.Pulse())
    made.send_multipart(pack(parcel, run="x", node=MEMBER, incarnation=7, to=9))
    yield 50


def asking(made: zmq.Socket) -> Iterator[int]:
    """How is the run?"""
    (parcel,) = parcels("ask", say.Ask())
    made.send_multipart(pack(parcel, run="", node=MEMBER, incarnation=0))
    while made.poll(0):
        made.recv_multipart()
    yield 50


def endless(endpoint: str, folder: Path | None) -> None:
    """Parts of one message, which has no last one; written by hand, as no library sends such."""
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL".ljust(55, b"\0")
    ready = b"\x05READY\x0bSocket-Type" + (6).to_bytes(4) + b"DEALER"
    part = b"\x03" + (2**16).to_bytes(8) + bytes(2**16)
    sent, end_s = 0, time.monotonic() + MOST_S
    while sent < MOST_BYTES and time.monotonic() < end_s:
        with suppress(OSError), socket.create_connection(address(endpoint), 1.0) as made:
            made.sendall(greeting + bytes([4, len(ready)]) + ready)
            said = b""
            while b"READY" not in said:
                said += made.recv(4096) or b"READY"
            while sent < MOST_BYTES:
                made.sendall(part)
                sent += len(part)


def silent(endpoint: str, folder: Path | None) -> None:
    """1,260 connections that say nothing, again and again."""
    end_s = time.monotonic() + MOST_S
    while time.monotonic() < end_s:
        made = []
        for _ in range(1260):
            with suppress(OSError):
                made.append(socket.create_connection(address(endpoint), 1.0))
        time.sleep(1.0)
        for one in made:
            one.close()


def plan(quick: bool) -> dict[str, tuple[bool, Callable[[str, Path | None], None]]]:
    """Name -> whether there are keys, and who floods."""
    found: dict[str, tuple[bool, Callable[[str, Path | None], None]]] = {
        "1,260 silent connections of strangers": (True, silent),
        "messages without end, no keys": (False, endless),
    }
    for keyed, (about, saying) in itertools.product(
        (True, False),
        {
            "messages of 1,500 frames": frames,
            "messages that wait unread": large,
            "messages that cannot be read": unreadable,
            "beats of nobody": stale,
            "questions": asking,
        }.items(),
    ):
        if keyed or not quick:
            who = "a member" if keyed else "no keys"
            found[f"{about}, {who}"] = keyed, lambda e, f, s=saying: flood(e, f, s)  # type: ignore[misc]
    return found


# -- The run -------------------------------------------------------------------------------------


def serve(endpoint: str, folder: Path | None, steps: int, told: Pipe) -> None:
    """Run, and tell: arrivals a second, the model's bytes, MB at most."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES // 2, FILES))
    from offbeat.workers.tasks.quadratic import Quadratic

    evaluate = Quadratic.evaluate

    def slowly(self: Any, x: Any) -> Any:  # in this forked process only
        time.sleep(BUSY_S)
        return evaluate(self, x)

    Quadratic.evaluate = slowly  # type: ignore[method-assign]
    engine = {"name": "zmq", "bind": endpoint, "processes": 0, "keys": str(folder or "")}
    result = offbeat.run(
        "quadratic(1000, noise=0.1)", "pure(lr=0.01)", f"1 {JOB_S}", engine=engine,
        stop={"steps": steps}, evaluate={"steps": steps // 4},
    )  # fmt: skip
    times = result.trace[:, 0].tolist()
    mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    told.send(((len(times) - 1) / (times[-1] - times[0]), result.x.tobytes(), mb))


def once(steps: int, folder: Path | None, who: Callable[[str, Path | None], None] | None) -> Any:
    """A run, flooded or not."""
    import multiprocessing

    endpoint = f"tcp://127.0.0.1:{port()}"
    ours, theirs = multiprocessing.Pipe()
    pids = [forked(lambda: serve(endpoint, folder, steps, theirs))]
    pids.append(forked(lambda: worker.Worker(endpoint, "w0" if folder else "", folder).run()))
    if who is not None:
        pids.append(forked(lambda: who(endpoint, folder)))
    try:
        if not ours.poll(MOST_S + JOB_S * steps):
            raise TimeoutError("the run does not end")
        return ours.recv()
    finally:
        reap(pids)


def main() -> None:
    """Run it."""
    given = arguments(str(__doc__).split("\n")[0], rounds={"type": int, "default": 3})
    rounds, steps = (1, 200) if given.quick else (given.rounds, 500)
    print(where())
    figures: dict[str, Any] = {}
    targets = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for one in (keys.SERVER, "w0", MEMBER):
            keys.new(folder, one)
            keys.authorize(folder, one, keys.show(folder, one))
        for about, (keyed, who) in plan(given.quick).items():
            secure = folder if keyed else None
            calm, hit = [once(steps, secure, None)], []
            for _ in range(rounds):
                hit.append(once(steps, secure, who))
                calm.append(once(steps, secure, None))
            ratio = statistics.median(
                2 * rate / (calm[k][0] + calm[k + 1][0]) for k, (rate, _, _) in enumerate(hit)
            )
            rate, mb = statistics.median(one[0] for one in hit), max(one[2] for one in hit)
            alike = len({model for _, model, _ in [*calm, *hit]}) == 1
            figures[about] = [rate, ratio, mb, alike]
            targets[f"{about}: 0.8 of undisturbed"] = ratio >= 0.8
            targets[f"{about}: below {MOST_MB:.0f} MB"] = mb < MOST_MB
            targets[f"{about}: the same model"] = alike
            same = "the same model" if alike else "ANOTHER MODEL"
            print(f"{about:42s} {rate:6.1f}/s  {ratio:.2f}x  {mb:4.0f} MB  {same}", flush=True)
    finish(figures, targets)


if __name__ == "__main__":
    main()
