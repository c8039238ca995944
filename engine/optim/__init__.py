"""Optimizers and their low-bit states."""
