"""How a config is read: YAML, overrides and dialects become values with a place; no option's name
is known here, the tables of `dialects` aside."""
