"""JUnit XML, as CI servers read it: one test case per check."""

from __future__ import annotations

import json
from typing import Any
from xml.etree import ElementTree as ET

Document = dict[str, Any]


def render(document: Document) -> str:
    counts, subject = document["summary"]["counts"], document["subject"]
    suites = ET.Element("testsuites")
    skipped = counts["not_applicable"] + counts["waived"] + counts["unproven"]
    suite = ET.SubElement(
        suites,
        "testsuite",
        name=_plain(f"isolation of {subject['dyno']} ({subject['app']})"),
        tests=str(len(document["checks"])),
        failures=str(counts["fail"]),
        errors=str(counts["error"]),
        skipped=str(skipped),
        time=f"{document['seconds']:.3f}",
        timestamp=_plain(document["at"])[:19],
    )
    for check in document["checks"]:
        case = ET.SubElement(
            suite,
            "testcase",
            classname=_plain(f"sandbox.{check['area']}"),
            name=_plain(f"{check['id']} {check['title']}"),
            time="0",
        )
        seen = check["observed"] or check["exercised"] or check["reason"]
        text = _plain(f"{check['claim']} promised: {check['declared']} observed: {seen}")
        status = check["status"]
        if status == "fail":
            ET.SubElement(case, "failure", message=_plain(seen), type="fail").text = text
        elif status == "error":
            ET.SubElement(case, "error", message=_plain(check["reason"]), type="error").text = text
        elif status != "pass":
            ET.SubElement(case, "skipped", message=_plain(f"{status}: {check['reason']}"), type=status)
        ET.SubElement(case, "system-out").text = json.dumps(check, sort_keys=True, ensure_ascii=True)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(suites, encoding="unicode") + "\n"


def _plain(text: str) -> str:
    """What XML 1.0 may hold: a control character has no form in it, not even an escaped one."""
    from sandbox.units import escape

    return escape(str(text).replace("\n", " "))
