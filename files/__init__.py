"""Writing files so that they are complete or absent, and opening nothing but regular files."""
