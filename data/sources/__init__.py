"""Where training text is kept: parquet folders and token files."""
