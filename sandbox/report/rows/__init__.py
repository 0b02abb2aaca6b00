"""The catalogue: every check there is, one module per area; a row is data, and the reading that it needs."""

from __future__ import annotations

from sandbox.report.rows import files, identity, kernel, network, process, resources

ALL = (*process.ROWS, *kernel.ROWS, *files.ROWS, *resources.ROWS, *network.ROWS, *identity.ROWS)
BY_ID = {row.id: row for row in ALL}
# Every call that a row asks about: the filter is emulated once for all of them.
CALLS = tuple(dict.fromkeys((("sync", ()), *(call for row in ALL for call in row.calls))))
