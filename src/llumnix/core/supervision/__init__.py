"""When an engine counts as hung, whose fault its end was, and when an instance is started again."""
