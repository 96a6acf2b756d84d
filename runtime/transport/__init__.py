"""Sockets, keys, the guard of connections, metrics for Prometheus."""
