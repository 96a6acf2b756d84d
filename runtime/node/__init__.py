"""One gossip node, without clock or socket."""

from offbeat.runtime.moved import attributes

__getattr__ = attributes("node")
