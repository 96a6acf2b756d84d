"""A gossip run: all nodes stacked, events under a virtual clock, or live nodes with a driver."""

from offbeat.runtime.moved import attributes

__getattr__ = attributes("gossip")
