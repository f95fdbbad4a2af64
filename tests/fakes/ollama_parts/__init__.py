"""The parts of the stand-in for Ollama 0.24.0: `tests/fakes/ollama.py` is the command that puts them together."""
