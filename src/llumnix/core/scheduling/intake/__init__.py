"""What the scheduler keeps out: facts that make no sense, and requests of which too many wait."""
