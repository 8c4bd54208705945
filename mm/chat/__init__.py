"""Talking with a model in the terminal: `mm chat`."""
