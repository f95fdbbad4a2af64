"""Endpoints for scripts and other programs."""
