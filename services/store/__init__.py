"""Persistence: conversations, messages, downloads, past loads and notes, in SQLite or another database."""
