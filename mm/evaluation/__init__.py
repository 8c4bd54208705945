"""Scores that equal the official ones, each beside its chance level and its controls."""
