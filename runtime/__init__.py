"""What makes it run: engines, records, checkpoints, replay, the command line."""
