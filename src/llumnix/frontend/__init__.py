"""vLLM's engine client over many engines: places requests, follows streams, grants migrations."""
