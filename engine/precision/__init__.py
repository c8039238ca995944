"""Number formats, wrapped around a finished model from outside."""
