"""The frontends of a deployment, as the fleet sees them."""
