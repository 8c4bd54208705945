"""Feed-forward parts: dense, or a sparse mixture of experts."""
