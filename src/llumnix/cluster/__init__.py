"""Ray: where instances and the controller run, and who starts them again."""
