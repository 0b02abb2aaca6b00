"""Above one dyno: choosing an engine, building slugs, running, listing and reclaiming.

Imports dyno and everything below; cli imports it.
"""
