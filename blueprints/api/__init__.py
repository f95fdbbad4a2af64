"""The endpoints that scripts and other programs use."""
