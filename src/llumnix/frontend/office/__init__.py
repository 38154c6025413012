"""A frontend that is a process of its own, and its line to the office, which has the fleet."""
