"""Tests of sweep.py and sweeps/."""
