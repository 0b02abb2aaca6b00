"""The network wall: a router namespace of our own, one table with constant rules, a resolver, and who watches them.

ruleset (pure) says what the tables are; router makes and removes them; admit lends a dyno its place in them; guard
stays resident: it answers names, logs denials and repairs. May import host and below.
"""
