"""SARIF 2.1.0: one rule per check, one result per status."""

from __future__ import annotations

import hashlib
import json
from typing import Any

Document = dict[str, Any]
_KINDS = {
    "pass": "pass",
    "fail": "fail",
    "error": "fail",
    "unproven": "review",
    "not_applicable": "notApplicable",
    "waived": "fail",
}
# security-severity as GitHub reads it: 9.0 and above is critical.
_SEVERITY = {"critical": "9.5", "severe": "8.5", "serious": "7.5", "moderate": "5.0", "minor": "2.0"}


def render(document: Document) -> str:
    subject = document["subject"]
    run = {
        "tool": {
            "driver": {
                "name": "sandbox",
                "version": str(document["product"]).removeprefix("sandbox ") or "0",
                "rules": [_rule(check) for check in document["checks"]],
            }
        },
        "results": [_result(index, check, subject) for index, check in enumerate(document["checks"])],
        "properties": {"summary": document["summary"], "subject": subject},
        "invocations": [{"executionSuccessful": document["summary"]["counts"]["error"] == 0}],
    }
    return json.dumps({"version": "2.1.0", "runs": [run]}, indent=1, sort_keys=True, ensure_ascii=True) + "\n"


def _rule(check: Document) -> Document:
    return {
        "id": check["id"],
        "shortDescription": {"text": check["title"]},
        "fullDescription": {"text": check["claim"] or check["title"]},
        "help": {"text": f"{check['fix'] or 'nothing to do'}. Impact: {check['impact'] or 'none'}."},
        "properties": {"security-severity": _SEVERITY.get(check["severity"], "1.0"), "tags": check["refs"]},
    }


def _result(index: int, check: Document, subject: Document) -> Document:
    status = check["status"]
    kind = _KINDS[status]
    seen = check["observed"] or check["exercised"] or check["reason"] or "no evidence"
    print_ = hashlib.sha256(
        f"{subject['app']}\0{check['id']}\0{subject['dyno']}".encode("utf-8", "replace")
    ).hexdigest()
    result: Document = {
        "ruleId": check["id"],
        "ruleIndex": index,
        "kind": kind,
        "level": _level(status, check["severity"]),
        "message": {"text": f"{check['title']}: {status}. {seen}"},
        "locations": [
            {
                "logicalLocations": [
                    {
                        "name": str(subject["dyno"]),
                        "fullyQualifiedName": f"{subject['app']}/{subject['dyno']}/{check['area']}",
                    }
                ]
            }
        ],
        "partialFingerprints": {"sandboxCheck/v1": print_},
    }
    if status == "waived":
        result["suppressions"] = [{"kind": "external", "justification": check["reason"] or "waived"}]
    return result


def _level(status: str, severity: str) -> str:
    if status not in ("fail", "error", "waived"):
        return "none"
    return "warning" if severity in ("minor", "moderate") else "error"
