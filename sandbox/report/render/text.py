"""The report on a terminal: three numbers, findings first, one line per check, 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from sandbox.report.document import age
from sandbox.units import escape

Document = dict[str, Any]
_MARKS = {"pass": "✓", "fail": "✗", "unproven": "?", "not_applicable": "–", "waived": "w", "error": "!"}
_COLOURS = {"pass": "32", "fail": "31;1", "unproven": "33", "not_applicable": "2", "waived": "35", "error": "31;1"}
_ORDER = ("fail", "error", "unproven", "waived")
_TIERS = {"kernel": "live", "host": "host", "twin": "twin", "network": "sent"}


def render(document: Document, *, colour: bool = False, width: int = 80) -> str:
    """The whole report as lines; foreign text is escaped, cut to the width only in the one-line form."""
    return "\n".join(_Page(document, colour=colour, width=max(60, width)).lines()) + "\n"


class _Page:
    def __init__(self, document: Document, *, colour: bool, width: int) -> None:
        self._document, self._colour, self._width = document, colour, width

    def lines(self) -> Iterator[str]:
        document = self._document
        yield from self._head()
        findings = [check for status in _ORDER for check in document["checks"] if check["status"] == status]
        if findings:
            yield ""
            yield f"  FINDINGS ({len(findings)})"
            for group in _alike(findings):
                yield from self._finding(group[0]) if len(group) == 1 else self._group(group)
        for area in dict.fromkeys(check["area"] for check in document["checks"]):
            yield ""
            yield f"  {escape(area).upper()}"
            for check in document["checks"]:
                if check["area"] == area:
                    yield self._line(check)
        yield from self._limits()
        yield from self._mutants()
        yield from self._tail()

    def _head(self) -> Iterator[str]:
        document, summary, subject = self._document, self._document["summary"], self._document["subject"]
        score = summary["mutation_score"]
        mutants = "not made" if score is None else f"{summary['mutants_caught']}/{summary['mutants_made']}"
        counts = summary["counts"]
        exposure = summary["exposure"] * 10
        yield "  ".join(escape(str(subject[key])) for key in ("dyno", "app", "engine", "runtime"))
        verdict = "fail" if counts["fail"] or counts["error"] else "unproven" if counts["unproven"] else "pass"
        yield (
            "  "
            + self._paint(f"exposure {exposure:.1f} of 10 {escape(str(summary['word']))}", verdict)
            + f"   proof {summary['proof_coverage'] * 100:.0f}%   mutants caught {mutants}"
        )
        words = [f"{counts[name]} {name.replace('_', ' ')}" for name in _MARKS if counts.get(name)]
        yield f"  {summary['checks']} checks: {', '.join(words)}"
        how = {
            "live": "a live dyno",
            "start": "this dyno, at its start",
            "twin": "a twin",
            "full": "a twin and its mutants",
        }
        made = how.get(document["mode"], escape(document["mode"]))
        yield f"  evidence {_age(age(document))} old, from {made}   policy {str(subject['policy_digest'])[:8]}"
        if summary["mutants_impossible"]:
            yield f"  {summary['mutants_impossible']} mutants cannot be made on this host"

    def _paint(self, text: str, status: str) -> str:
        return f"\x1b[{_COLOURS.get(status, '0')}m{text}\x1b[0m" if self._colour else text

    def _line(self, check: Document) -> str:
        status = check["status"]
        mark = self._paint(_MARKS.get(status, "?"), status)
        head = f"{check['id']:<6} {check['title']}"
        tiers = dict.fromkeys(_TIERS.get(item["tier"], "") for item in check["evidence"])
        tail = "+".join(name for name in ("live", "sent", "twin", "host") if name in tiers)
        if status not in ("pass", "fail"):
            tail = status.replace("_", " ")
        seen = check["observed"] or check["exercised"] or check["reason"]
        room = self._width - 4 - 42 - len(tail) - 2
        return f"  {mark} {_fit(escape(head), 42)} {_fit(escape(seen), room)} {tail}".rstrip()

    def _finding(self, check: Document) -> Iterator[str]:
        status = check["status"]
        head = f"{check['id']} {escape(check['title'])} ({escape(check['severity'])}) {status}"
        yield f"  {self._paint(_MARKS.get(status, '?'), status)} {head}"
        broken = [item for item in check["evidence"] if item["holds"] is False]
        for item in broken[:4]:
            promised = f", promised {item['promised']}" if item["promised"] else ""
            yield from self._wrap("seen", f"{item['what']}: {item['observed']}{promised}")
        if len(broken) > 4:
            yield f"           and {len(broken) - 4} more"
        if check["reason"]:
            yield from self._wrap("why", check["reason"])
        if status in ("fail", "error"):
            yield from self._wrap("means", f"not kept: {check['claim']}")
            if check["fix"]:
                impact = f"   impact: {check['impact']}" if check["impact"] else ""
                yield from self._wrap("fix", check["fix"] + impact)

    def _group(self, checks: list[Document]) -> Iterator[str]:
        """Checks that are in the same state for the same reason."""
        status = checks[0]["status"]
        yield f"  {self._paint(_MARKS.get(status, '?'), status)} {len(checks)} checks {status.replace('_', ' ')}"
        yield from self._wrap("why", checks[0]["reason"])
        yield from self._wrap("these", " ".join(check["id"] for check in checks))

    def _wrap(self, name: str, text: str) -> Iterator[str]:
        words, line = escape(text).split(" "), ""
        prefix = f"      {name:<6}"
        for word in words:
            if line and len(prefix) + len(line) + len(word) + 1 > self._width:
                yield f"{prefix}{line}"
                prefix, line = " " * 12, ""
            line = f"{line} {word}" if line else word
        yield f"{prefix}{line}"

    def _limits(self) -> Iterator[str]:
        bars = self._document["limits"]
        if bars:
            yield ""
            yield "  LIMITS, PROMISED AGAINST MEASURED"
        for bar in bars:
            measured, promised = bar["measured"] or 0, bar["promised"] or 1
            filled = max(0, min(24, round(24 * measured / promised)))
            drawn = "█" * filled + "·" * (24 - filled)
            yield f"  {escape(str(bar['what'])):<22} {drawn} {escape(bar['shown'][1])} of {escape(bar['shown'][0])}"

    def _mutants(self) -> Iterator[str]:
        mutants = self._document["mutants"]
        odd = [m for m in mutants if not m["caught"] or m["unexpected"]]
        if not mutants:
            return
        yield ""
        yield f"  MUTANTS: {sum(m['caught'] for m in mutants)} twins with one clause taken out were caught"
        for mutant in odd:
            if mutant["impossible"]:
                yield from self._wrap("–", f"{mutant['name']}: cannot be made here: {mutant['impossible']}")
            elif mutant["failed"]:
                yield from self._wrap("!", f"{mutant['name']}: {mutant['failed']}")
            elif mutant["missed"]:
                yield from self._wrap("✗", f"{mutant['name']} not caught by {', '.join(mutant['missed'])}")
            if mutant["unexpected"]:
                yield from self._wrap("?", f"{mutant['name']} turned {', '.join(mutant['unexpected'])} red as well")

    def _tail(self) -> Iterator[str]:
        document = self._document
        denied = document["events"].get("denied", [])
        yield ""
        if denied:
            words = ", ".join(f"{item['what']} ({item['packets']})" for item in denied[:5])
            yield from self._wrap("denied", words)
        for note in document["notes"]:
            yield from self._wrap("note", note)
        yield "  LIMITS OF THIS REPORT"
        for text in document["known_limits"]:
            yield from self._wrap("·", text)
        seal = document.get("seal")
        if isinstance(seal, dict):
            previous = str(document.get("previous", ""))[:12] or "none"
            key, digest = (escape(str(seal.get(name, ""))) for name in ("key", "digest"))
            yield f"  signed ed25519:{key[:16]}  report {digest[:12]}  after {escape(previous)}"
        else:
            yield "  not signed"


def _alike(checks: list[Document]) -> list[list[Document]]:
    groups: dict[tuple[str, str, int], list[Document]] = {}
    for number, check in enumerate(checks):
        # What was seen to be open stands alone.
        own = number if check["status"] in ("fail", "waived") or not check["reason"] else -1
        groups.setdefault((check["status"], check["reason"], own), []).append(check)
    return list(groups.values())


def _fit(text: str, width: int) -> str:
    if width <= 0:
        return ""
    return text.ljust(width) if len(text) <= width else text[: width - 1] + "…"


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def differences(old: Document, new: Document) -> Iterable[str]:
    """What changed between two reports, by check: new findings first."""
    before = {check["id"]: check for check in old["checks"]}
    after = {check["id"]: check for check in new["checks"]}
    bad = ("fail", "error", "unproven")
    groups: dict[str, list[str]] = {"NEW": [], "FIXED": [], "CHANGED": [], "OTHER EVIDENCE": []}
    for name, check in after.items():
        known = before.get(name)
        if known is None:
            groups["NEW"].append(f"{name} {check['title']}: {check['status']} (not in the old report)")
            continue
        was, now = known["status"], check["status"]
        text = f"{name} {check['title']}: {was} → {now}"
        if was != now:
            worse = now in bad or (was == "pass" and now == "waived")
            key = "NEW" if worse and was not in bad else "FIXED" if was in bad and now not in bad else "CHANGED"
            groups[key].append(text)
        elif (known["observed"], known["exercised"]) != (check["observed"], check["exercised"]):
            seen = check["observed"] or check["exercised"]
            groups["OTHER EVIDENCE"].append(f"{name} {check['title']}: {seen}")
    # A check that is left out hides whatever it would have found.
    groups["NEW"] += [f"{name} is not in the new report" for name in before if name not in after]
    for title, lines in groups.items():
        if lines:
            yield f"{title} ({len(lines)})"
            yield from (f"  {escape(line)}" for line in lines)
    if not any(groups.values()):
        yield "nothing changed"
