"""What is said between processes, and what is kept of it."""
