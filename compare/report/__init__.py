"""The page that `runs.py report` writes: its content, and its HTML, style and script."""
