"""Training loops that join runs, and a server in a thread."""

import socket
import threading
import time
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

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


def together(*loops):
    """Run every loop in a thread; answers what they return, or raises what one raised."""
    found = [None] * len(loops)

    def call(at):
        try:
            found[at] = loops[at]()
        except BaseException as error:
            found[at] = error

    threads = [threading.Thread(target=call, args=(at,), daemon=True) for at in range(len(loops))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return found


class Net(nn.Module):
    """The built-in perceptron with one hidden layer, its parameters in its order."""

    def __init__(self, task):
        super().__init__()
        dtype = torch.from_numpy(task.initial(0)).dtype
        for name, (i, o) in zip("ab", task.model.shapes, strict=True):
            self.register_parameter(f"{name}0", nn.Parameter(torch.zeros(i, o, dtype=dtype)))
            self.register_parameter(f"{name}1", nn.Parameter(torch.zeros(o, dtype=dtype)))

    def forward(self, inputs):
        return torch.relu(inputs @ self.a0 + self.a1) @ self.b0 + self.b1


def digits_loop(address, task, optimizer, exact=False, join=offbeat.join, **options):
    """Train on the samples that the built-in worker would draw; answers the run's counts."""
    net = Net(task)
    steps = optimizer(net.parameters())
    with join(address, net, steps, **options) as run:
        while not run.over:
            where = np.array([run.shard]), np.array([run.draw])
            steps.zero_grad()
            if exact:
                x = nn.utils.parameters_to_vector(net.parameters()).detach().numpy()
                losses, gradients = task.gradient(x[None], *where)
                loss = float(losses[0])
                nn.utils.vector_to_parameters(
                    torch.from_numpy(gradients[0]), (g := Net(task)).parameters()
                )
                for p, q in zip(net.parameters(), g.parameters(), strict=True):
                    p.grad = q.detach()
            else:
                a, y = task.shards.samples(*where)
                loss = nn.functional.cross_entropy(
                    net(torch.from_numpy(a[0])), torch.from_numpy(y[0])
                )
                loss.backward()
            steps.step()
            run.step(loss)
    return run.jobs


def little(width=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 1))
