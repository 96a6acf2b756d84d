"""Who talks to whom: graphs, mixing matrices, time-varying sequences."""
