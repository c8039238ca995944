"""Configs of other trainers, turned into our options and units before layers are merged.

One file per dialect. A name that merely differs is an alias in `settings.names`.
"""
