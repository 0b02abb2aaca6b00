"""One dyno's life: its slot on the host, start behind the gate, verification, limits, log lines, end.

Imports engine, host, app, policy and the floor; supervisor, report and cli import it.
"""
