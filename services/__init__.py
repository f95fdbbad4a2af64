"""What Switchyard does, free of the web: usable from a view, a test, a shell or a script."""
