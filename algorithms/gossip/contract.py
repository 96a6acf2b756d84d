"""What a gossip method is told, and what it may do.

    point = method.ask(node)          mixes with the neighbours, names where it wants a gradient
    method.tell(node, gradient)       takes the answer, publishes what the neighbours need next

Between one ``tell`` and the next ``ask`` messages travel, once a round.  A method works on the last
dimension: the same lines run on one node's vectors ``[d]`` and on those of all nodes, ``[n, d]``.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from offbeat.algorithms.base import completed
from offbeat.algorithms.compression.contract import Compressor, error_of, made
from offbeat.algorithms.compression.identity import Identity
from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.base.registry import Spec

Points = NDArray | tuple[NDArray, ...]
"""Where gradients are wanted; several are answered on one sample."""


@dataclass(frozen=True)
class Channel:
    """Something that is published every round.

    Every node has a public copy h_i of what it publishes, and every neighbour knows it.

    Args:
        gain: the step with which the method adds ``mix`` to what it publishes.
        memory: whether a message is the compressed difference to the public copy; else it is the
            compressed value, and the public copy is that.
        damping: how far the public copy moves towards what is published, in (0, 1].
        conserved: whether the nodes' sum must be that of what they put in, also of those that are
            left when others are gone: what was mixed in from one that is gone is given back.
    """

    gain: float = 1.0
    memory: bool = True
    damping: float = 1.0
    conserved: bool = False


class Node(Protocol):
    """All that a method can see and do; its fields are the method's state.

    Fields are replaced, never changed in place.  What ``init`` publishes is known to all without a
    message where all nodes start at one point.
    """

    x: NDArray
    """The model, ``[d]`` or ``[n, d]``."""

    def __getattr__(self, field: str) -> Any: ...

    def __setattr__(self, field: str, value: Any) -> None: ...

    def publish(self, channel: str, value: NDArray) -> NDArray:
        """Send ``value``, compressed; answers what it was made, on a channel without memory."""
        ...

    def mix(self, channel: str) -> NDArray:
        """sum_j w_ij (h_j - h_i) of the public copies, as the last messages left them."""
        ...

    def average(self, channel: str) -> NDArray:
        """sum_j w_ij h_j: ``mix`` and the own public copy, which is what was published last."""
        ...

    def push(self, channel: str, value: NDArray) -> object:
        """Give ``value`` away: a share a_ji to every node j that hears this one, a_ii to itself."""
        ...

    def pushed(self, channel: str) -> NDArray:
        """sum_j a_ij value_j: what was kept and what arrived."""
        ...


class Gossip(ABC):
    """Base of gossip methods.

    Args:
        channels: what it publishes.
        compressor: of messages, or its text.
    """

    spec: Spec | None = None
    varying = True
    """Whether it stays right where weights change: graphs, lost messages, nodes that are away.

    If not, they must be symmetric, too.
    """
    asynchronous = True
    """Whether its nodes may do unequal numbers of rounds."""
    synchronous = True
    """Whether its nodes may do equal numbers of rounds."""
    pushes = False
    """Whether it gives shares away (columns of the weights sum to 1) instead of mixing."""
    overlap = False
    """Whether a round's gradient can be computed while its messages are on their way."""
    points = 1
    """At how many points it wants gradients in a round, on one sample."""
    partners = "all"
    """With whom an asynchronous node exchanges after a gradient: "all" neighbours, or "one"."""

    def __init__(
        self, channels: Mapping[str, Channel], compressor: str | Compressor = "identity"
    ) -> None:
        self.channels, self.compressor = dict(channels), made(compressor)

    @property
    def exact(self) -> bool:
        """Whether messages are not compressed."""
        return type(self.compressor) is Identity  # one that is derived may do otherwise

    def check(self, n: int) -> None:  # noqa: B027 - most have nothing to refuse
        """Raise ConfigError where the method cannot run on n nodes."""

    def suits(self, d: int) -> None:
        """Raise ConfigError where a model of ``d`` numbers would run away from its copies.

        What is left out of a message is in the next: more must be read than is left out.  That is
        so where alpha is known or omega < 1; else it is measured.
        """
        made, omega = self.compressor, self.compressor.omega(d)
        if made.alpha(d) is not None or (omega is not None and omega < 1):
            return
        if (error := error_of(made, d)) > 1:
            name = self.spec.name if self.spec else type(self).__name__
            why = (
                "whose error does not get smaller with what it compresses; take scaled-sign or topk"
            )
            if omega is not None:
                why = (
                    f"whose error is {error:.3g} times what it compresses; take contractive({made})"
                )
            raise ConfigError(f"{name} would diverge with {made} at d = {d:,}, {why}")

    @abstractmethod
    def init(self, node: Node) -> Points | None:
        """The run begins at ``node.x``; answers where ``begin`` wants a gradient, if it does."""

    def begin(self, node: Node, gradient: Any) -> None:  # noqa: B027 - most need none
        """The gradient that ``init`` asked for."""

    @abstractmethod
    def ask(self, node: Node) -> Points:
        """Mix; answer where a gradient is wanted."""

    @abstractmethod
    def tell(self, node: Node, gradient: Any) -> None:
        """Take the gradient (a tuple if ``ask`` answered one); publish."""

    def models(self, node: Node) -> NDArray:
        """What the nodes would answer now, like ``x``."""
        return node.x


def own_gossip(given: Any) -> Gossip:
    """A method that need not be derived from ``Gossip``: it has ``channels``, init, ask and tell.

    Raises:
        ConfigError: it lacks one of these.
    """
    made: Gossip = completed(given, Gossip)
    if made is not given:
        known = getattr(given, "channels", None)
        if not isinstance(known, Mapping) or not all(
            isinstance(channel, Channel) for channel in known.values()
        ):
            raise ConfigError(
                f"{type(given).__name__} has no channels: name what it publishes, as "
                'channels = {"x": Channel()}'
            )
        Gossip.__init__(made, given.channels, getattr(given, "compressor", "identity"))
    return made
