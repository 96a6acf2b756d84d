"""What methods of a user's own are given: memory that nobody else reads."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from offbeat.workers.tasks.contract import ours

if TYPE_CHECKING:
    from offbeat.algorithms.gossip import Gossip


class Facade:
    """A server as a method of a user's own sees it: the model is a copy.

    Args:
        server: all else is its.
    """

    def __init__(self, server: Any) -> None:
        self._server = server

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._server, name)
        return found.copy() if name == "x" else found


class OwnGossip:
    """A gossip method of a user's own: it may change a node's fields in place.

    What it published, or wants gradients at, are the fields as they were: they are copied before
    each call.

    Args:
        method: all else is its.
    """

    def __init__(self, method: "Gossip") -> None:
        self._method = method

    def __getattr__(self, name: str) -> Any:
        if name == "_method":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self._method, name)

    def init(self, node: Any) -> None:
        """See ``Gossip``."""
        self._method.init(_copied(node))

    def ask(self, node: Any) -> Any:
        """See ``Gossip``."""
        return self._method.ask(_copied(node))

    def tell(self, node: Any, gradient: Any) -> None:
        """See ``Gossip``."""
        self._method.tell(_copied(node), gradient)


def _copied(node: Any) -> Any:
    for name, held in list(vars(node).items()):
        if isinstance(held, np.ndarray) and not name.startswith("_"):
            fresh: NDArray = held.copy()
            setattr(node, name, fresh)
    return node


def private(method: Any) -> Any:
    """``method`` of gossip, as an ``OwnGossip`` where it is a user's own."""
    return method if ours(method) else OwnGossip(method)
