"""The heart: one writer of lifecycle state, and the pure rules it follows."""
