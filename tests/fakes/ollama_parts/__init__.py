"""The parts of the fake Ollama 0.24.0; `tests/fakes/ollama.py` is the command that combines them."""
