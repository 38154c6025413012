"""What the frontend knows of each engine, and how it calls and hears them."""
