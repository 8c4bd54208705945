"""`mm doctor`: what would go wrong in a run, found before it starts."""
