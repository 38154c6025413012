"""What the controller believes of every instance, and what it decides."""
