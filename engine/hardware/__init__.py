"""Processes, devices and what they can do."""
