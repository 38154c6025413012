"""One vLLM engine: everything of llumnix that runs in an instance's process."""
