"""Training loops in this process, as actors run them: what they are given, and when again."""

import queue

import numpy as np
import torch
from loops import little

import offbeat
from offbeat.runtime.compute.backend import JobRequest
from offbeat.runtime.on_ray.loops import Loops
from offbeat.workers.work import OwnLoop

DIM = sum(p.numel() for p in little().parameters())


def joined(address):
    net = little()
    return offbeat.join(address, net, torch.optim.SGD(net.parameters(), lr=0.01))


def leaves_and_returns(address):
    with joined(address) as run:
        run.step(1.0)  # and four are left
    with joined(address) as run:
        while run.step(2.0):
            pass


def test_a_loop_that_leaves_with_a_job_is_given_it_again():
    came = queue.SimpleQueue()
    loops = Loops(OwnLoop(5, leaves_and_returns), lambda worker, answer: came.put((worker, answer)))
    x = np.ones(DIM, np.float32)
    for serial in (7, 8):
        loops.give(JobRequest(serial, 0, 0, 5 * serial, 5, serial, x, None))
        worker, answer = came.get(timeout=60.0)
        assert (worker, answer.serial, answer.loss) == (0, serial, 2.0)
        np.testing.assert_array_equal(answer.payload, np.zeros(DIM))
    loops.end()
