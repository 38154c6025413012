"""What a client can reach."""
