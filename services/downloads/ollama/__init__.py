"""Models from the registries that Ollama pulls from: by its command or its HTTP API."""
