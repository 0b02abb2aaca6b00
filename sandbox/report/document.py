"""The report as one document: what every format is made from. The shape is schema.json, which is shipped."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from sandbox import __version__
from sandbox.dyno.record import Record
from sandbox.policy import policy as policies
from sandbox.policy.policy import Policy
from sandbox.report import judge
from sandbox.report.model import SCHEMA_VERSION, Control, Fact, Result, Status, Tier, severity
from sandbox.units import format_bytes

Document = dict[str, Any]
KIND = "sandbox-isolation-report"
LIMITS = (
    "The app shares the host's kernel: a hole that nobody knows yet can open this wall. gVisor and VMs are stronger.",
    "Neighbours on the same processor may learn something from its caches and timing.",
    "What is allowed stays possible: an app with egress can send what it knows to any public address.",
    "A signature shows that this host's key signed this report. It does not show that the host's root was honest.",
    "A pass is true at the time of its evidence.",
)
_OBSERVED, _EXERCISED = (Tier.KERNEL, Tier.HOST), (Tier.TWIN, Tier.NETWORK)
_FOREIGN = 300  # characters of any one text


class Made(NamedTuple):
    """What a run of the examination brought together."""

    mode: str  # live, start, twin or full
    record: Record
    results: Sequence[Result]
    mutants: Sequence[Mapping[str, Any]]
    host: Mapping[str, Any]
    measured: Sequence[Mapping[str, Any]]
    events: Mapping[str, Any]
    notes: Sequence[str]
    seconds: float


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def build(made: Made) -> Document:
    """The document, without its seal."""
    record, score = made.record, judge.score(made.results)
    counted = {status.value: sum(r.status is status for r in made.results) for status in Status}
    possible = [m for m in made.mutants if not m.get("impossible")]
    caught = sum(not m["missed"] and not m.get("failed") for m in possible)
    spec = record.spec
    return {
        "kind": KIND,
        "schema": SCHEMA_VERSION,
        "product": f"sandbox {__version__}",
        "at": now(),
        "mode": made.mode,
        "seconds": round(made.seconds, 3),
        "summary": {
            "exposure": round(score.exposure / 10, 3),
            "word": score.word,
            "proof_coverage": score.proof_coverage,
            "mutation_score": round(caught / len(possible), 3) if possible else None,
            "mutants_caught": caught,
            "mutants_made": len(possible),
            "mutants_impossible": len(made.mutants) - len(possible),
            "checks": len(made.results),
            "counts": counted,
        },
        "subject": {
            "app": record.app,
            "dyno": record.name,
            "id": spec.container_id,
            "engine": record.engine,
            "runtime": record.runtime,
            "size": spec.policy.size,
            "policy_digest": spec.policy.digest(),
            "policy_version": policies.VERSION,
            "stack_digest": record.stack_digest,
            "slug_digest": record.slug_digest,
            "uid_base": spec.uid_base,
            "address": str(record.place.address) if record.place else None,
            "port": record.port or None,
            "egress": spec.policy.egress.document(),
            "waived": sorted(clause.value for clause in spec.policy.waived),
            "pid": record.pid,
            "start_ticks": record.start_ticks,
            "boot_id": record.boot_id,
        },
        "host": dict(made.host),
        "checks": [_check(result) for result in made.results],
        "mutants": [_mutant(mutant) for mutant in made.mutants],
        "limits": list(made.measured),
        "events": dict(made.events),
        "notes": [_cut(note) for note in made.notes],
        "known_limits": list(LIMITS),
    }


def _check(result: Result) -> Document:
    row, control = result.row, result.control
    return {
        "id": row.id,
        "area": row.area.value,
        "title": row.title,
        "claim": row.claim,
        "severity": severity(row.weight),
        "weight": row.weight,
        "status": result.status.value,
        "badness": result.badness,
        "reason": _cut(result.reason),
        "declared": _cut(result.facts[0].promised) if result.facts else "",
        "observed": _cut(judge.column(result, _OBSERVED)),
        "exercised": _cut(judge.column(result, _EXERCISED)),
        "evidence": [_evidence(fact) for fact in result.facts],
        "control": None
        if control is None
        else {"by": control.by, "observed": _cut(control.observed), "at": control.at},
        "refs": row.refs.split(),
        "fix": row.fix,
        "impact": row.impact,
    }


def _evidence(fact: Fact) -> Document:
    return {
        "tier": fact.tier.value,
        "what": _cut(fact.what),
        "promised": _cut(fact.promised),
        "observed": _cut(fact.observed),
        "holds": fact.holds,
        "why": _cut(fact.why),
    }


def _mutant(mutant: Mapping[str, Any]) -> Document:
    return {
        "name": mutant["mutant"],
        "says": mutant["says"],
        "caught": not mutant["missed"] and not mutant.get("failed") and not mutant.get("impossible"),
        "turned": {row: _cut(str(seen)) for row, seen in mutant["reds"].items()},
        "missed": list(mutant["missed"]),
        "unexpected": list(mutant["sloppy"]),
        "impossible": _cut(str(mutant.get("impossible", ""))),
        "failed": _cut(str(mutant.get("failed", ""))),
        "seconds": mutant.get("seconds", 0.0),
    }


def _cut(text: str) -> str:
    """Foreign text is bounded; that it is cut is said."""
    return text if len(text) <= _FOREIGN else text[: _FOREIGN - 1] + "…"


def controls(mutants: Iterable[Mapping[str, Any]], own: Mapping[str, str]) -> dict[str, Control]:
    """For each row what turned it red: the most specific mutant that did."""
    found: dict[str, Control] = {row: Control("the same run", text, now()) for row, text in own.items()}
    size: dict[str, int] = {}
    for mutant in mutants:
        for row, seen in mutant["reds"].items():
            if len(mutant["reds"]) < size.get(row, 1 << 30):
                size[row] = len(mutant["reds"])
                found[row] = Control(f"mutant {mutant['mutant']}", str(seen)[:_FOREIGN], now())
    return found


def bars(policy: Policy, measured: Mapping[str, Any], usage: Mapping[str, Any]) -> list[Document]:
    """What was promised against what use came to; without a twin, what the live dyno has used so far."""

    def bar(what: str, promised: float, used: float | None, shown: tuple[str, str]) -> Document:
        return {"what": what, "promised": promised, "measured": used, "shown": list(shown)}

    found = []
    memory = measured.get("memory", {}).get("peak", usage.get("memory_peak_bytes"))
    if memory is not None:
        found.append(
            bar(
                "memory", policy.memory_max_bytes, memory, (format_bytes(policy.memory_max_bytes), format_bytes(memory))
            )
        )
    pids = measured.get("processes", usage.get("pids_peak") or usage.get("pids"))
    if pids is not None:
        found.append(bar("processes", policy.pids_max, pids, (str(policy.pids_max), str(pids))))
    if "cpu" in measured and policy.cpu_quota_us:
        cap, used = policy.cpu_quota_us / 100_000, round(measured["cpu"]["cpus"], 2)
        found.append(bar("CPUs", cap, used, (f"{cap:g}", f"{used:g}")))
    for name, what, most in (("disk", "disk", policy.disk_bytes), ("shm", "shared memory", policy.shm_bytes)):
        if name in measured:
            used = int(measured[name]["written"])
            found.append(bar(what, most, used, (format_bytes(most), format_bytes(used))))
    if "files" in measured:
        found.append(
            bar("files", policy.disk_inodes, measured["files"], (str(policy.disk_inodes), str(measured["files"])))
        )
    if "NET-22" in measured:
        flood = measured["NET-22"]
        found.append(
            bar("new flows of a burst", flood["most"], flood["arrived"], (str(flood["most"]), str(flood["arrived"])))
        )
    return found


_TEXTS = "id area title claim severity reason declared observed exercised fix impact".split()


def check_shape(document: Document, path: str) -> None:
    """That a document from a file has what the formats read. ReportError otherwise."""
    from sandbox.report.seal import ReportError

    try:
        for check in document["checks"]:
            Status(check["status"])
            for key in _TEXTS:
                _is(check[key], str)
            _is(check["weight"], int)
            for item in check["evidence"]:
                for key in ("tier", "what", "promised", "observed", "why"):
                    _is(item[key], str)
                _is(item["holds"], bool, type(None))
            for ref in check["refs"]:
                _is(ref, str)
            if check["control"] is not None:
                for key in ("by", "observed", "at"):
                    _is(check["control"][key], str)
        for mutant in document["mutants"]:
            for key in ("name", "says", "impossible", "failed"):
                _is(mutant[key], str)
            _is(mutant["turned"], dict)
            _is(mutant["caught"], bool)
            for item in (*mutant["missed"], *mutant["unexpected"]):
                _is(item, str)
        summary = document["summary"]
        for key in ("exposure", "proof_coverage"):
            _is(summary[key], int, float)
        for key in ("mutants_caught", "mutants_made", "mutants_impossible", "checks"):
            _is(summary[key], int)
        _is(summary["mutation_score"], int, float, type(None))
        _is(summary["word"], str)
        for status in Status:
            _is(summary["counts"][status.value], int)
        for key in ("subject", "host", "events"):
            _is(document[key], dict)
        for key in ("dyno", "app", "engine", "runtime", "policy_digest", "port"):
            _is(document["subject"][key], str, int, type(None))
        _is(document["subject"]["egress"]["mode"], str)
        for item in (*document["subject"]["egress"]["networks"], *document["subject"]["egress"]["names"]):
            _is(item, str)
        for bar in document["limits"]:
            _is(bar["promised"], int, float)
            _is(bar["measured"], int, float, type(None))
            for text in (bar["what"], bar["shown"][0], bar["shown"][1]):
                _is(text, str)
        for item in document["events"].get("denied", []):
            _is(item["what"], str)
            _is(item["packets"], int)
        for item in document["host"].get("findings", []):
            for key in ("verdict", "topic", "statement", "evidence"):
                _is(item[key], str)
        for text in (*document["notes"], *document["known_limits"]):
            _is(text, str)
        _is(document.get("number", 0), int)
        _is(document.get("previous", ""), str)
        _is(document["seconds"], int, float)
        for key in ("mode", "product"):
            _is(document[key], str)
        age(document)
        if "seal" in document:
            for key in ("key", "digest", "signature"):
                _is(document["seal"][key], str)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ReportError(
            f"{path} has not the shape of a report: {type(error).__name__} {str(error)[:60]}.",
            hint="it was cut, or altered.",
        ) from error


def _is(value: object, *kinds: type) -> None:
    # Every bool is an int to Python; not here.
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise TypeError(f"{str(value)[:40]!r}")


def example(text: str) -> Document:
    """A small document in which every text that an app could choose is ``text``: for examining the formats."""
    fact = Fact(Tier.KERNEL, text, text, text, holds=False, why=text)
    from sandbox.report.rows import ALL

    result = Result(ALL[0], Status.FAIL, (fact,), text, Control("mutant bare", text, now()))
    return {
        "kind": KIND,
        "schema": SCHEMA_VERSION,
        "product": "sandbox",
        "at": now(),
        "mode": "live",
        "seconds": 0.1,
        "summary": {
            "exposure": 0.9,
            "word": "UNSAFE",
            "proof_coverage": 0.0,
            "mutation_score": None,
            "mutants_caught": 0,
            "mutants_made": 0,
            "mutants_impossible": 0,
            "checks": 1,
            "counts": {status.value: int(status is Status.FAIL) for status in Status},
        },
        "subject": {
            "app": text,
            "dyno": text,
            "id": text,
            "engine": "oci",
            "runtime": "runc",
            "policy_digest": "0" * 64,
            "policy_version": 3,
            "egress": {"mode": "public", "networks": [text], "names": [text]},
            "waived": [],
            "address": None,
            "port": None,
            "size": "eco",
            "stack_digest": "",
            "slug_digest": "",
            "uid_base": 0,
            "pid": 1,
            "start_ticks": 1,
            "boot_id": "",
        },
        "host": {"kernel": text, "findings": []},
        "checks": [_check(result)],
        "mutants": [_mutant({"mutant": "bare", "says": text, "reds": {"PRV-01": text}, "missed": [], "sloppy": []})],
        "limits": [{"what": "memory", "promised": 2, "measured": 1, "shown": [text, text]}],
        "events": {"denied": [{"what": text, "packets": 1}], "programs": [text]},
        "notes": [text],
        "known_limits": [text],
    }


def age(document: Document) -> float:
    """Seconds since the evidence was read."""
    at = datetime.strptime(document["at"], "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)
    return max(0.0, time.time() - at.timestamp())
