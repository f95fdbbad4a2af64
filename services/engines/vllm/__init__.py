"""vLLM: one container for each model."""
