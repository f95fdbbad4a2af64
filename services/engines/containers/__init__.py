"""Container runtimes: the port, and its adapter for the local Docker daemon."""
