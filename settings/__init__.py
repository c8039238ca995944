"""How a config is read: YAML, presets, overrides and dialects become values with a place; options
are known by name in `dialects`, `translate` and `constraints` only."""
