"""HTTP: vLLM's own OpenAI application over our engine client."""
