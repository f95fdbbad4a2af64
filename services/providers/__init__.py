"""Who serves what: the local services that the app can start and stop."""
