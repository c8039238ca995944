"""Reads run directories, in any state and of any age."""
