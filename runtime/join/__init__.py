"""Training loops of the user's own, which join a run."""
