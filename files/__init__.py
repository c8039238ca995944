"""Files that are whole or absent, and files that are opened only if they are files."""
