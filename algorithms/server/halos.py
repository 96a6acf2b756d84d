"""HALoS: Hierarchical Asynchronous Local SGD over Slow Networks for Geo-Distributed Large Language
Model Training.

ICML 2025.  Two levels of servers, Delayed Nesterov at both, no barrier.  A worker's update is
applied by its region's server at once; after ``push`` updates the region sends what its model moved
to the global server, which applies that, and the region's model is merged with the new global one.
After the released code (utnslab/halos) and its experiment's settings: alpha is the weight of the
global model in the merge, a region's next push counts from the merged model, workers are divided
among regions in equal runs.  The time between servers is not modelled, so the worker whose update
is the last of a push starts from the merged model; in the released code, where that is on its way,
from the region's.
"""

from numpy.typing import NDArray

from offbeat.algorithms.server.contract import ALGORITHMS, Algorithm, Server, Update
from offbeat.algorithms.server.outer import DelayedNesterov
from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.base.registry import Count, Fraction, Positive


class Halos(Algorithm):
    """Regions' servers under a global one."""

    def __init__(
        self,
        lr: float,
        region_lr: float,
        regions: int,
        push: int,
        alpha: float,
        outer: DelayedNesterov,
        inner: list[DelayedNesterov],
    ) -> None:
        self.lr, self.region_lr, self.push, self.alpha = lr, region_lr, push, alpha
        self.regions, self.outer, self.inner = regions, outer, inner
        self.models: list[NDArray] = []  # [d] each, of the regions' servers
        self.bases: list[NDArray] = []  # [d] each, as of the last push
        self.counts = [0] * regions  # updates since then

    def check(self, n: int) -> None:
        """A region has a worker."""
        if self.regions > n:
            raise ConfigError(f"halos: {self.regions} regions, but there are {n} workers")

    def start(self, server: Server) -> None:
        self.models = [server.x] * self.regions
        self.bases = [server.x] * self.regions
        super().start(server)

    def arrive(self, server: Server, update: Update) -> None:
        """A step of the region's server, and of the global one if it is time for a push."""
        r = update.worker * self.regions // server.n
        self.models[r] = self.models[r] - self.region_lr * self.inner[r].step(update.payload)
        self.counts[r] += 1
        if self.counts[r] == self.push:
            self.counts[r] = 0
            server.apply(self.lr * self.outer.step(self.bases[r] - self.models[r]))
            merged = (1 - self.alpha) * self.models[r] + self.alpha * server.x
            self.models[r] = self.bases[r] = merged
        server.assign(update.worker, at=self.models[r])

    def joined(self, server: Server, worker: int, lost: int) -> None:
        for _ in range(lost):
            server.assign(worker, at=self.models[worker * self.regions // server.n])


@ALGORITHMS.register("halos")
def halos(
    *,
    lr: Positive = 0.3,
    momentum: Fraction = 0.5,
    buffer: Count = 2,
    region_lr: Positive = 3.2,
    region_momentum: Fraction = 0.9,
    region_buffer: Count = 16,
    regions: Count = 2,
    push: Count = 32,
    alpha: Positive = 0.25,
) -> Halos:
    """HALoS: Delayed Nesterov at the servers of regions and at a global one above them."""
    if alpha > 1:
        raise ConfigError(f"halos: alpha={alpha} is a weight; give at most 1")
    inner = [DelayedNesterov(region_momentum, region_buffer) for _ in range(regions)]
    outer = DelayedNesterov(momentum, buffer)
    return Halos(lr, region_lr, regions, push, alpha, outer, inner)
