"""What an operator needs to bring a run to other machines."""
