"""Model lifecycle: the switcher, the only writer of lifecycle state, and the pure rules it follows."""
