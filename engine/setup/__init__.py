"""From a config to a trainer, and what is tried before training starts."""
