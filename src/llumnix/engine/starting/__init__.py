"""Which request of an engine starts next where memory is short."""
