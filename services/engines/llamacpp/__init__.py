"""The embedded engine: llama.cpp in child processes, and the GGUF files it reads."""
