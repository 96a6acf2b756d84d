"""What makes it run: engines, records, checkpoints, replay, the command line.  Private."""

from offbeat.runtime import moved as moved
