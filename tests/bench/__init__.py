"""Measures against peers on this machine, in one run: ``make bench``."""
