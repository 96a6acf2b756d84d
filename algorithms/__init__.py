"""The mathematics: one method a file, each readable beside its paper."""
