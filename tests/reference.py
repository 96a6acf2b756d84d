"""The reference machine of the AsGrad family, written straight down and slowly.

One gradient per arrival, plain lists, no shared code with the engine but the addressed random
streams: an oracle for order, times and models.
"""

import heapq
from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from offbeat.runtime.base.randomness import rng


class Machine:
    def __init__(self, gradient: Callable, x: NDArray, times: Callable, n: int, lr: float) -> None:
        self.gradient, self.x, self.times, self.n, self.lr = gradient, x, times, n, lr
        self.queues = [deque() for _ in range(n)]
        self.busy = [False] * n
        self.number = [0] * n
        self.heap: list = []
        self.seq, self.now = 0, 0.0
        self.trace: list[tuple] = []  # (time, worker, job, read step, step)
        self.running: list[int] = []

    def assign(self, i: int, t: int) -> None:
        self.queues[i].append((self.x, t, self.number[i]))
        self.number[i] += 1
        if not self.busy[i]:
            self.start(i)

    def start(self, i: int) -> None:
        self.busy[i] = True
        duration = self.times(i, self.queues[i][0][2])
        heapq.heappush(self.heap, (self.now + duration, self.seq, i))
        self.seq += 1

    def run(self, schedule: "Schedule", b: int, steps: int) -> NDArray:
        for i in range(self.n):
            self.assign(i, 0)
        done: list[int] = []
        for t in range(steps):
            self.running.append(sum(self.busy))
            self.now, _, i = heapq.heappop(self.heap)
            snapshot, a, number = self.queues[i].popleft()
            self.busy[i] = False
            if self.queues[i]:
                self.start(i)
            self.x = self.x - self.lr * self.gradient(snapshot, i, number)
            self.trace.append((self.now, i, number, a, t))
            done.append(i)
            if len(done) == b:
                for j in schedule(done):
                    self.assign(j, t + 1)
                done = []
        return self.x


Schedule = Callable[[list[int]], list[int]]


def pure(done: list[int]) -> list[int]:
    return list(done)


def random(n: int, seed: int) -> Schedule:
    def picks():
        block = 0
        while True:
            yield from rng(seed, "uniform", 0, block).integers(n, size=1024).tolist()[::-1]
            block += 1

    stream = picks()
    return lambda done: [next(stream) for _ in done]


def shuffled(n: int, seed: int, once: bool = False) -> Schedule:
    def picks():
        index = 0
        while True:
            address = 0 if once else index
            yield from rng(seed, "permutation", 0, address).permutation(n).tolist()
            index += 1

    stream = picks()
    return lambda done: [next(stream) for _ in done]


def one_by_one(task) -> Callable:
    """The task's gradient, one job a call."""

    def gradient(x: NDArray, worker: int, number: int) -> NDArray:
        return task.gradient(x[None], np.array([worker]), np.array([number]))[1][0]

    return gradient
