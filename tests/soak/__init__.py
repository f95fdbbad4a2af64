"""The soak: one real console under everything at once, and the promises that hold meanwhile, at rest and at the end."""
