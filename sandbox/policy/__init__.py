"""The wall as frozen values, and pure functions that compile them for an engine. No I/O here.

Imports the floor only; everything above imports it.
"""
