"""From facts to a status, and from statuses to three numbers. Pure, and never green by default."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from sandbox.errors import SandboxError
from sandbox.report.facts import Facts
from sandbox.report.model import CRITICAL, Control, Fact, Result, Row, Status, Tier

_WORDS = ((0.0, "PERFECT"), (1.0, "SAFE"), (5.0, "OK"), (7.5, "MEDIUM"), (9.0, "EXPOSED"), (10.0, "UNSAFE"))


# Of a live dyno: nothing was read for the row, and nothing went wrong.
NOT_TRIED = "not tried: only a twin can show it (sandbox report --full)"


class Score(NamedTuple):
    """``exposure``: 0 to 10, rounded up. ``proof_coverage``: 0 to 1, by weight."""

    exposure: float
    word: str
    proof_coverage: float


def examine(row: Row, facts: Facts) -> Result:
    """What the row's evidence says; of a clause that the operator waived, only that it holds all the same."""
    result = _examine(row, facts)
    if row.clause in facts.record.spec.policy.waived and result.status not in (Status.PASS, Status.NOT_APPLICABLE):
        reason = f"the operator waived it for this dyno: --waive {row.clause.value}"
        return result._replace(status=Status.WAIVED, reason=reason)
    return result


def _examine(row: Row, facts: Facts) -> Result:
    """An exception is an error of ours, unreadable evidence is unproven."""
    found: list[Fact] = []
    try:
        found += facts.tried(row)
        found += facts.emulated(row)
        if row.examine is not None:
            found += row.examine(facts)
    except (SandboxError, OSError) as error:
        gone = "" if facts.lives() else "the dyno ended while it was examined: "
        return Result(row, _worst(found, Status.UNPROVEN), tuple(found), f"{gone}{error}")
    except Exception as error:  # noqa: BLE001 - a check that breaks proves nothing, and must say so
        return Result(row, _worst(found, Status.ERROR), tuple(found), f"{type(error).__name__}: {error}")
    return conclude(row, found, facts)


def _lacks(row: Row, facts: Facts, open_: list[Fact]) -> str:
    """Why everything that is open here is known and accepted; an empty text when one thing is not."""
    if row.lacks is None:
        return ""
    reasons = [row.lacks(facts, fact) for fact in open_]
    return reasons[0] if all(reasons) else ""


def _worst(found: list[Fact], otherwise: Status) -> Status:
    """What was seen to be open stays a failure, whatever went wrong afterwards."""
    return Status.FAIL if any(fact.holds is False for fact in found) else otherwise


def conclude(row: Row, found: list[Fact], about: Facts) -> Result:
    """The status that facts amount to: one that does not hold decides, then one that says nothing."""
    facts = tuple(found)
    if open_ := [fact for fact in found if fact.holds is False]:
        lacks = _lacks(row, about, open_)
        return Result(row, Status.WAIVED if lacks else Status.FAIL, facts, lacks)
    unknown = [fact for fact in found if fact.holds is None and not fact.absent]
    if unknown:
        return Result(row, Status.UNPROVEN, facts, unknown[0].why or unknown[0].observed)
    if any(fact.holds for fact in found):
        return Result(row, Status.PASS, facts)
    if found:
        return Result(row, Status.NOT_APPLICABLE, facts, found[0].why)
    return Result(row, Status.UNPROVEN, facts, NOT_TRIED)


def control(result: Result, controls: Mapping[str, Control]) -> Result:
    """A pass needs a control: something on this host that turned this very check red."""
    known = controls.get(result.row.id)
    if result.status is Status.PASS and known is None:
        return result._replace(
            status=Status.UNPROVEN, reason="nothing on this host was seen to turn this check red: it may be blind"
        )
    return result._replace(control=known)


Known = Mapping[str, frozenset[str]]


def known(results: Iterable[Result]) -> Known:
    """What is open in waived rows: row, and what its open facts are about."""
    return {result.row.id: _open(result) for result in results if result.status is Status.WAIVED}


def _open(result: Result) -> frozenset[str]:
    return frozenset(fact.what for fact in result.facts if fact.holds is False)


def reds(results: Iterable[Result], before: Known | None = None) -> dict[str, str]:
    """The rows that found something open, with what they saw. Of waived ones only what is open beyond ``before``."""
    return {
        result.row.id: next((f"{f.what}: {f.observed}" for f in result.facts if f.holds is False), result.reason)
        for result in results
        if result.status is Status.FAIL
        or (result.status is Status.WAIVED and _open(result) - (before or {}).get(result.row.id, frozenset()))
    }


def score(results: Iterable[Result]) -> Score:
    """Exposure with its gates, and how much of it is proven."""
    counted = list(results)
    rows = [result for result in counted if result.status is not Status.NOT_APPLICABLE]
    total = sum(result.row.weight for result in rows) or 1
    bad = sum(result.row.weight * result.badness for result in rows)
    exposure = math.ceil(100 * bad / total) / 10
    critical = [result for result in rows if result.row.weight >= CRITICAL]
    # A mean hides one fatal hole; the gates do not.
    if any(result.status in (Status.FAIL, Status.ERROR) for result in critical):
        exposure = max(exposure, 9.0)
    if any(result.status is Status.UNPROVEN for result in critical):
        exposure = max(exposure, 5.0)
    proven = sum(result.row.weight for result in rows if result.control is not None and _is_fresh(result))
    word = next((text for limit, text in _WORDS if exposure < limit or exposure == limit == 0.0), "DANGEROUS")
    # Downwards: 100 % only when it is all.
    return Score(exposure, word, math.floor(1000 * proven / total) / 1000)


def _is_fresh(result: Result) -> bool:
    return result.status in (Status.PASS, Status.FAIL) and any(fact.holds is not None for fact in result.facts)


def column(result: Result, tiers: Iterable[Tier]) -> str:
    """What the facts of those tiers say, in one line: what broke first, else the first that held."""
    chosen = [fact for fact in result.facts if fact.tier in set(tiers)]
    chosen.sort(key=lambda fact: (fact.holds is not False, fact.holds is not None))
    if not chosen:
        return ""
    more = f" (+{len(chosen) - 1})" if len(chosen) > 1 else ""
    return f"{chosen[0].what}: {chosen[0].observed}{more}"
