"""The soak test: concurrent clients and faults on one real console, and the invariants checked during and after it."""
