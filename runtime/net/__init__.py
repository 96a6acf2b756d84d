"""Machines that share nothing but a network: wire, links, keys; server and workers, or peers."""
