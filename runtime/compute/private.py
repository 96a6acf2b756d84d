"""What methods of a user's own are given: memory that nobody else reads."""

from collections.abc import Collection
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from offbeat.runtime.base.errors import ConfigError, nearest
from offbeat.workers.tasks.contract import ours

if TYPE_CHECKING:
    from offbeat.algorithms.gossip import Gossip

CALLS = {"init", "begin", "ask", "tell"}  # of a method
VERBS = {"publish", "mix", "average", "push", "pushed"}  # what a node does for a method


class Facade:
    """A server as a method of a user's own sees it: models given and taken are copies.

    Args:
        server: all else is its.
    """

    __slots__ = ("_server",)

    def __init__(self, server: Any) -> None:
        object.__setattr__(self, "_server", server)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._server, name)
        return found.copy() if name == "x" else found

    def __setattr__(self, name: str, value: Any) -> None:
        raise ConfigError(
            f"the method sets server.{name}, which changes nothing; "
            "server.apply(delta) takes the step x - delta"
        )

    def apply(self, delta: Any) -> None:
        """See ``Server``; the model keeps its precision."""
        x = self._server.x
        step = np.asarray(delta, x.dtype)
        if step.shape != x.shape:
            raise ConfigError(
                f"the method applied a step of shape {list(step.shape)}; the model's is "
                f"{list(x.shape)}"
            )
        self._server.apply(step)

    def assign(self, worker: int, like: Any = None, *, at: Any = None, **job: Any) -> None:
        if at is not None or like is not None:
            job["at"] = np.array(like.x if at is None else at)
        self._server.assign(worker, like, **job)


class OwnNode:
    """A node as a method of a user's own sees it: what it says and is told are copies.

    Args:
        node: whose fields it has.
        channels: that there are.
    """

    def __init__(self, node: Any, channels: Collection[str]) -> None:
        vars(self).update(_node=node, _channels=channels)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._node, name)
        if name not in VERBS:
            return found

        def does(channel: str, *values: Any) -> Any:
            if channel not in self._channels:
                raise ConfigError(
                    f'the method has no channel "{channel}"{nearest(channel, self._channels)}'
                )
            return deepcopy(found(channel, *map(np.array, values)))

        return does

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._node, name, value)


class OwnGossip:
    """A gossip method of a user's own: it may change a node's fields in place.

    What it wants gradients at are the fields as they were: they are copied before each call.

    Args:
        method: all else is its.
    """

    def __init__(self, method: "Gossip") -> None:
        self._method = method

    def __getattr__(self, name: str) -> Any:
        if name == "_method":  # while it is unpickled
            raise AttributeError(name)
        found = getattr(self._method, name)
        if name not in CALLS:
            return found
        return lambda node, *gradient: found(self._copied(node), *gradient)

    def models(self, node: Any) -> NDArray:
        """See ``Gossip``; the fields stay as they were."""
        held = dict(vars(node))
        try:
            return np.array(self._method.models(self._copied(node)))
        finally:
            vars(node).clear()
            vars(node).update(held)

    def _copied(self, node: Any) -> Any:
        for name, held in list(vars(node).items()):
            if not name.startswith("_"):
                setattr(node, name, deepcopy(held))
        return OwnNode(node, self._method.channels)


def private(method: Any) -> Any:
    """``method`` of gossip, as an ``OwnGossip`` where it is a user's own."""
    return method if ours(method) else OwnGossip(method)
