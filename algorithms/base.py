"""The one list of methods, of servers and of gossip."""

from offbeat.runtime.registry import Registry

ALGORITHMS = Registry("algorithm")
