"""The parity table: what each engine and runtime keeps of the policy, on each guest, from the reports of real runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from sandbox.policy.clauses import Clause
from sandbox.report.rows import BY_ID
from tests.conftest import ROOT

DOCUMENT = ROOT / "docs" / "PARITY.md"
_PLACES = (("docker-runc", "docker"), ("oci-runc", "oci/runc"), ("oci-crun", "oci/crun"), ("oci-runsc", "oci/runsc"))
_MARKS = {"pass": "✓", "fail": "**✗**", "error": "**!**", "unproven": "?", "waived": "w", "not_applicable": "–"}
# The worst of a clause's checks decides its cell.
_ORDER = ("fail", "error", "waived", "pass", "unproven", "not_applicable")


def render(results: Mapping[str, Path]) -> str:
    """The document, from the results folder of each guest."""
    columns = {
        (guest, place): _statuses(folder / "parity" / f"{name}.{kind}.json")
        for guest, folder in results.items()
        for name, place in _PLACES
        for kind in (["live"] if name == "oci-runsc" else ["twin"])
    }
    return "\n".join(_lines(columns)) + "\n"


def _statuses(path: Path) -> dict[str, tuple[str, str]]:
    if not path.exists() or not path.stat().st_size:
        return dict.fromkeys(BY_ID, ("error", "the guest made no report"))
    return {check["id"]: (check["status"], check["reason"]) for check in json.loads(path.read_text())["checks"]}


def _lines(columns: Mapping[tuple[str, str], Mapping[str, tuple[str, str]]]) -> Iterator[str]:
    yield "# What each engine keeps, on stock kernels"
    yield ""
    yield "Written by `make parity` from the reports that the guests of `make test-vm` made; they fail when it is stale."
    yield "Docker, runc and crun: a twin that was attacked. runsc: a live dyno, started with every clause waived that"
    yield "the host cannot read of gVisor; without the waivers it is refused, and the message names each clause."
    yield ""
    yield "✓ every check of the clause that could be proven in that one run holds; w waived by name: the runtime cannot"
    yield "keep it, or the host cannot read it; ? unproven: nothing was tried (a live dyno is not attacked), or nothing in that"
    yield "run turned the check red (a guest makes no mutants); – not on this kernel; ✗ open; ! could not be examined."
    yield ""
    heads = [f"{place}<br>{guest}" for guest, place in columns]
    yield f"| clause | {' | '.join(heads)} |"
    yield "|---" * (len(heads) + 1) + "|"
    for clause in Clause:
        ids = [row.id for row in BY_ID.values() if row.clause is clause]
        cells = [_MARKS[_worst(found[name][0] for name in ids)] if ids else "" for found in columns.values()]
        if any(cells):
            yield f"| `{clause.value}`: {clause.promise} | {' | '.join(cells)} |"
    yield ""
    yield "## Checks that are not the same on docker, runc and crun everywhere"
    yield ""
    yield f"| check | {' | '.join(heads)} |"
    yield "|---" * (len(heads) + 1) + "|"
    same = 0
    for name, row in BY_ID.items():
        found = [column[name][0] for column in columns.values()]
        if len({status for (_, place), status in zip(columns, found, strict=True) if place != "oci/runsc"}) == 1:
            same += 1
        else:
            yield f"| {name} {row.title} | {' | '.join(_MARKS[status] for status in found)} |"
    yield ""
    yield f"{same} of {len(BY_ID)} checks say the same on all of those."


def _worst(statuses: Iterator[str]) -> str:
    return min(statuses, key=_ORDER.index)
