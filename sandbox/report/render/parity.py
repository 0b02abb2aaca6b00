"""The same policy on every engine and runtime, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sandbox.units import escape

Document = dict[str, Any]
MARKS = {"pass": "✓", "fail": "✗", "unproven": "?", "not_applicable": "–", "waived": "w", "error": "!"}


def lines(columns: Mapping[str, Document | str]) -> Iterator[str]:
    """A row for each check that is not the same everywhere, and the numbers; ``str`` says why there is no report."""
    made = {name: column for name, column in columns.items() if isinstance(column, dict)}
    width = max((len(name) for name in made), default=10) + 2
    yield f"{'':<44}" + "".join(f"{name:<{width}}" for name in made)
    for what, key in (("exposure, of 10", "exposure"), ("proof coverage", "proof_coverage")):
        cells = (f"{column['summary'][key] * (10 if key == 'exposure' else 1):.2f}" for column in made.values())
        yield f"{what:<44}" + "".join(f"{cell:<{width}}" for cell in cells)
    same = 0
    tables = {name: {check["id"]: check for check in column["checks"]} for name, column in made.items()}
    first = next(iter(tables.values()), {})
    for name, check in first.items():
        found = [table[name]["status"] for table in tables.values() if name in table]
        if len(set(found)) == 1 and found[0] in ("pass", "not_applicable"):
            same += 1
            continue
        title = escape(f"{name} {check['title']}")
        yield f"{title[:43]:<44}" + "".join(f"{MARKS[status] + ' ' + status:<{width}}" for status in found)
    yield f"{same} checks hold, or do not apply, everywhere"
    for name, column in columns.items():
        if isinstance(column, str):
            yield f"{name}: no report: {escape(column)}"
