"""The ZeroMQ engine: processes that share nothing but a network."""
