"""Machines that share nothing but a network: wire, links, membership, keys, server and workers, peers."""
