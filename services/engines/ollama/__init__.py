"""Ollama: a server that others use too."""
