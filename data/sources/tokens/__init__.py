"""Token files: arrays of token ids, their descriptions and checksums."""
