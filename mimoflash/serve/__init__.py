"""Serving: a conversation in the terminal."""
