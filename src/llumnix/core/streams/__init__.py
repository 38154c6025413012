"""Which engine owns each stream."""
