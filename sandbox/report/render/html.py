"""One self-contained page: no script, no outside resource; it filters with radio buttons and prints."""

from __future__ import annotations

import os
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sandbox.report import seal
from sandbox.units import escape

Document = dict[str, Any]
_WORDS = {
    "pass": "holds",
    "fail": "open",
    "unproven": "unproven",
    "not_applicable": "does not apply",
    "waived": "known, accepted",
    "error": "could not be examined",
}
_PICTURE = {"pass": "blocked", "fail": "REACHED", "waived": "accepted", "not_applicable": "not here"}
_MARKS = {"pass": "✓", "fail": "✗", "unproven": "?", "not_applicable": "–", "waived": "w", "error": "!"}
# The picture: what stands around the dyno, and the check that says whether it is reached.
_TARGETS = (
    ("NET-02", "this host"),
    ("NET-03", "other apps"),
    ("NET-05", "private networks"),
    ("NET-04", "cloud metadata"),
    ("NET-07", "IPv6"),
    ("NET-21", "mail, port 25"),
    ("NET-27", "hypervisor"),
)
_GROUND = (
    ("FS-02", "files of the host"),
    ("PRV-19", "other processes"),
    ("PRV-10", "dangerous kernel calls"),
    ("FS-06", "devices"),
    ("RES-01", "memory beyond its limit"),
)


def render(document: Document) -> str:
    """The page. Everything that is inserted is escaped, for HTML by the template engine, for terminals by us."""
    environment = Environment(
        loader=FileSystemLoader(os.path.dirname(os.path.abspath(__file__))),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["inert"] = lambda value: escape(str(value).replace("\n", " "))
    checks = document["checks"]
    by_id = {check["id"]: check for check in checks}
    counts = document["summary"]["counts"]
    worst = next((c for status in ("fail", "error", "unproven") for c in checks if c["status"] == status), None)
    areas = list(dict.fromkeys(check["area"] for check in checks))
    egress = document["subject"]["egress"]
    data = (
        seal.canonical(document).decode("ascii").replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    )
    return environment.get_template("report.html.j2").render(
        document=document,
        summary=document["summary"],
        subject=document["subject"],
        host=document["host"],
        verdict="open" if counts["fail"] or counts["error"] else "unproven" if counts["unproven"] else "holds",
        worst=worst,
        exposure=f"{document['summary']['exposure'] * 10:.1f}",
        coverage=f"{document['summary']['proof_coverage'] * 100:.0f}",
        areas=[(area, [check for check in checks if check["area"] == area]) for area in areas],
        findings=[c for status in ("fail", "error", "unproven", "waived") for c in checks if c["status"] == status],
        words=_WORDS,
        marks=_MARKS,
        picture=_PICTURE,
        targets=[(by_id[name], text) for name, text in _TARGETS if name in by_id],
        ground=[(by_id[name], text) for name, text in _GROUND if name in by_id],
        allowed=egress["mode"] != "none",
        reach="the internet"
        if egress["mode"] == "public"
        else ", ".join([*egress["networks"], *egress["names"]]) or "nothing",
        bars=[(bar, _share(bar)) for bar in document["limits"]],
        at=document["at"][:19].replace("T", " ") + " UTC",
        data=data,
    )


def _share(bar: Document) -> float:
    """Per cent of the promise, at most 100."""
    return round(max(0.0, min(100.0, 100 * (bar["measured"] or 0) / (bar["promised"] or 1))), 1)
