"""The data plane: from a model id to its instance, and the bytes through."""
