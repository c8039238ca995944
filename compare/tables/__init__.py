"""The tables that `runs.py list`, `diff` and `tree` print."""
