"""A deployment in virtual time."""
