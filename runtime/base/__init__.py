"""Ground that every room may use: errors, registry, randomness, arrays, logs, text tables."""
