"""KV blocks from worker to worker, usable without the rest of llumnix."""
