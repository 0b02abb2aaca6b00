"""Runs untrusted apps as dynos: one walled Linux container each, whose wall is read back from the kernel."""

__version__ = "0.1.0"
