"""Official scoring rules as pure functions: predictions and references in, numbers out; no model."""
