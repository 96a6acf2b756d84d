"""A run with a server: its ledger of jobs, its clock, its loop."""
