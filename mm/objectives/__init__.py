"""Objectives: (model, batch) -> losses and counts."""
