"""Everything that is neither mathematics nor text: precision, optimizer, checkpoints, the run."""
