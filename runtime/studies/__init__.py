"""Studies: grids of experiments, their tables and reports, and answers from recorded traces."""
