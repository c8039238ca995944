"""Runs that are trained again, in memory: to repeat one, to find where two part, to look at a
batch."""
