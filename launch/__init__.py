"""From a config to a run: its beginning, its parts, and what is tried before it starts."""
