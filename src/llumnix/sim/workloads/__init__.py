"""The requests to simulate."""
