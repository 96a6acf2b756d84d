"""Who computes: jobs, and the compute backends that take them."""
