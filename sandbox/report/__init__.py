"""Isolation reports: reads what holds a dyno out of the kernel, attacks a twin of it, and says what is proven.

Used by the command line only; it may import everything below it, and nothing of the command line.
"""
