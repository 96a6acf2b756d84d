"""What a worker is: its task and data, its work, its speed, links and availability."""
