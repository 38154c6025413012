"""When an engine counts as hung, and when an instance is started again."""
