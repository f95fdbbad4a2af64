"""What runs containers: the port, and the local Docker daemon behind it."""
