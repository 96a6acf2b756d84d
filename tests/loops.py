"""A server in a thread, for training loops that join it."""

import socket
import threading
import time
from contextlib import contextmanager

import offbeat

SMALL = {"stop": {"steps": 3}, "clock": "real"}


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def listens(address):
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", int(address.rpartition(":")[2]))) == 0


@contextmanager
def serving(task, algorithm, fleet, work="own-loop(steps=5)", processes=0, **options):
    """Gives the server's address, and a dictionary that has the result once the run is over."""
    address, ended = f"tcp://127.0.0.1:{free_port()}", {}
    engine = f"zmq({address!r}, most_idle_s=20.0, processes={processes})"

    def serve():
        try:
            ended["result"] = offbeat.run(
                task, algorithm, fleet, work=work, engine=engine, **{**SMALL, **options}
            )
        except Exception as error:
            ended["error"] = error

    thread = threading.Thread(target=serve)
    thread.start()
    while thread.is_alive() and not listens(address):
        time.sleep(0.01)
    if "error" in ended:
        raise ended["error"]
    try:
        yield address, ended
    finally:
        thread.join(60)
    assert not thread.is_alive()
