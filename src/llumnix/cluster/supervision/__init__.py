"""How one instance is started, watched, started again and ended."""
