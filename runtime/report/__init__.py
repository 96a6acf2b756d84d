"""What was recorded, drawn and asked again: reports, following, what-if."""
