"""Raw text to parquet folders and token files; used by prepare.py only."""
