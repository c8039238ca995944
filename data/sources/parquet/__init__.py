"""Folders of parquet files: index, segments, reading, counting."""
