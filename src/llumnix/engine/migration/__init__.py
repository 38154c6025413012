"""The llumlet in its engine, and its port on vLLM."""
