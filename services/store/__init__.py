"""What is kept across restarts: conversations, messages and past loads."""
