"""What answers at the port without vLLM's application: during the start, and to probes."""
