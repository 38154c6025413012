"""What an engine tells the controller."""
