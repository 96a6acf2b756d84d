"""One table of all server methods: the options under which tests run each."""

from offbeat.algorithms.server import ALGORITHMS

N = 8
# Options under which a method is run here; every registered method has a row.
METHODS = {
    "pure": {},
    "random": {},
    "shuffled": {},
    "shuffle-once": {"wait": 3},
    "minibatch": {},
    "random-reshuffling": {"batch": 2},
    "shuffle-once-sgd": {},
    "sgd": {},
    "delay-adaptive": {"concurrency": 4},
    "rennala": {"batch": 3},
    "ringmaster": {"threshold": 12, "stop_stale": True},
    "rescaled": {},
    "ringleader": {},
    "fedbuff": {"buffer": 3},
    "fedasync": {"weight": "hinge"},
    "local-sgd": {},
    "diloco": {"momentum": 0.5, "dylu": True},
    "async-local-sgd": {
        "momentum": 0.5, "power": 0.5, "discard": 30, "buffer": 2, "sample_shards": True
    },
    "delayed-nesterov": {
        "buffer": 4, "c": 0.1, "momentum": 0.5, "grace_s": 0.3, "charged": False, "dylu": True,
    },
    "look-ahead": {"momentum": 0.5, "grace_s": 0.2},
    "decoupled-diloco": {
        "momentum": 0.5, "quorum": 3, "fragments": 2, "overlap": 1, "alpha": 0.3,
    },
    "streaming-diloco": {"momentum": 0.5, "fragments": 3},
    "eager-diloco": {"momentum": 0.5},
    "heloco": {"momentum": 0.5, "grace_s": 0.2},
    "muloco": {"momentum": 0.5},
    "halos": {"region_lr": 0.1, "region_momentum": 0.5, "region_buffer": 2, "push": 3, "lr": 0.5},
}  # fmt: skip
# What workers do with a job, where it is more than a gradient.
WORKS = {
    name: "local-steps(momentum(lr=0.2, beta=0.3), steps=3)"
    for name in (
        *("local-sgd", "diloco", "async-local-sgd", "delayed-nesterov"),
        *("look-ahead", "decoupled-diloco", "halos", "streaming-diloco", "eager-diloco"),
        *("heloco", "muloco"),
    )
}


def make(name, **more):
    return ALGORITHMS[name](**{"lr": 0.05, **METHODS[name], **more})
