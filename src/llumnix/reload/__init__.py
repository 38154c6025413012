"""What a running server reads again: its file of keys, and the settings of its scheduler."""
