"""The event log and its replay, and lines to the user."""
