"""The decoder: a stack of layers, each a mixer and a feed-forward part chosen by a pattern."""
