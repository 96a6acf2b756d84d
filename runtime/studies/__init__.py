"""Studies: grids of experiments, and their tables."""
