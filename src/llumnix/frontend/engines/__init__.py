"""How the frontend calls engines, and what it knows of each."""
