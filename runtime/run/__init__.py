"""What is around every run: stop rules, records, checkpoints, folders."""
