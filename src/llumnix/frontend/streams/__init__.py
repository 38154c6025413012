"""One frontend's streams: what is known of each, their migrations, and what follows from events."""
