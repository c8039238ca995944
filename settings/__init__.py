"""How a config is read: files and the command line become one value per option, with its place.

A value passes command_line or yaml_reader, sources, merge (by names and values) and constraints.
Options are known by name in `names`, `constraints` and `foreign` only.
"""
