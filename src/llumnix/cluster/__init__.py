"""The processes of a deployment: Ray, the fleet, the controller; how they start and stop."""
