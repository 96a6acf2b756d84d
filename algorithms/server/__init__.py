"""Asynchronous methods with a server: AsGrad and what came after it."""

from offbeat.algorithms.server.asgrad import (
    minibatch,
    pure,
    random,
    random_reshuffling,
    sgd,
    shuffle_once,
    shuffle_once_sgd,
    shuffled,
)
from offbeat.algorithms.server.contract import ALGORITHMS, Algorithm, Server, Update
from offbeat.algorithms.server.decoupled import decoupled_diloco, streaming_diloco
from offbeat.algorithms.server.delay_adaptive import delay_adaptive
from offbeat.algorithms.server.eager import eager_diloco
from offbeat.algorithms.server.fedasync import fedasync
from offbeat.algorithms.server.fedbuff import fedbuff
from offbeat.algorithms.server.halos import halos
from offbeat.algorithms.server.heloco import heloco
from offbeat.algorithms.server.local_sgd import (
    async_local_sgd,
    delayed_nesterov,
    diloco,
    local_sgd,
    look_ahead,
)
from offbeat.algorithms.server.method import Method
from offbeat.algorithms.server.muloco import muloco
from offbeat.algorithms.server.rennala import rennala
from offbeat.algorithms.server.rescaled import rescaled
from offbeat.algorithms.server.ringleader import ringleader
from offbeat.algorithms.server.ringmaster import ringmaster

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "Method",
    "Server",
    "Update",
    "async_local_sgd",
    "decoupled_diloco",
    "delay_adaptive",
    "delayed_nesterov",
    "diloco",
    "eager_diloco",
    "fedasync",
    "fedbuff",
    "halos",
    "heloco",
    "local_sgd",
    "look_ahead",
    "minibatch",
    "muloco",
    "pure",
    "random",
    "random_reshuffling",
    "rennala",
    "rescaled",
    "ringleader",
    "ringmaster",
    "sgd",
    "shuffle_once",
    "shuffle_once_sgd",
    "shuffled",
    "streaming_diloco",
]
