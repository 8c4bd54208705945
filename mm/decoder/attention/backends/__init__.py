"""Attention backends: one signature, `attend(q, k, v, layout, options)`, and several ways to compute it."""
