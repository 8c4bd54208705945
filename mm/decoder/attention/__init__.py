"""Mixers: the part of a layer that moves information between positions."""
