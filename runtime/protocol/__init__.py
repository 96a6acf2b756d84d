"""Messages and time in, messages and events out; no sockets."""
