"""What an engine tells the controller, and what the fleet finds out after its death."""
