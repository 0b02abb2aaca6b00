"""The words of a report as values: what was seen (Fact), what is asked (Row), what it means (Result). Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from sandbox.policy.clauses import Clause

if TYPE_CHECKING:
    from sandbox.report.facts import Facts

SCHEMA_VERSION = 1
# Weights, after systemd-analyze security: what a customer loses when the check fails.
CRITICAL, SEVERE, SERIOUS, MODERATE, MINOR = 1500, 1250, 1000, 500, 100


class Status(Enum):
    """Only PASS is green, and only with evidence that was seen to turn red on this host."""

    PASS = "pass"
    FAIL = "fail"
    UNPROVEN = "unproven"
    NOT_APPLICABLE = "not_applicable"
    WAIVED = "waived"
    ERROR = "error"


class Tier(Enum):
    """Where a piece of evidence comes from; none of these can be forged by the app."""

    KERNEL = "kernel"  # kernel state, read from outside
    NETWORK = "network"  # sent from the dyno's address, by us in its network namespace
    TWIN = "twin"  # tried inside a twin: the same policy and code path, no customer code
    HOST = "host"  # the host's own state


class Area(Enum):
    PROCESS = "process"
    KERNEL = "kernel surface"
    FILES = "files"
    RESOURCES = "resources"
    NETWORK = "network"
    IDENTITY = "identity"
    LOGS = "logs"
    SIDE_CHANNELS = "side channels"


class Fact(NamedTuple):
    """One piece of evidence. ``holds``: None when nothing can be said, and ``why`` says why."""

    tier: Tier
    what: str
    promised: str
    observed: str
    holds: bool | None
    why: str = ""
    absent: bool = False  # the feature does not exist here: ``observed`` is the evidence of absence


Examine = Callable[["Facts"], Iterator[Fact]]


class Row(NamedTuple):
    """One check of the catalogue.

    ``claim``: what a customer may rely on. ``accepts``: outcomes of the prober's attempts that mean "denied"; any
    other outcome is none. ``calls``: (call, arguments) that the live filter must refuse. ``lacks``: why this engine
    does not keep what that fact says, or an empty text. A row in which nothing else is open is waived, and counts in
    the exposure; one other open fact makes it a failure.
    """

    id: str
    area: Area
    title: str
    claim: str
    weight: int
    refs: str
    fix: str
    impact: str
    examine: Examine | None = None
    clause: Clause | None = None  # the operator may have waived it by name
    accepts: tuple[str, ...] = ()
    calls: tuple[tuple[str, tuple[int, ...]], ...] = ()
    lacks: Callable[[Facts, Fact], str] | None = None


class Control(NamedTuple):
    """What turned the check red on this host: the proof that it can fail."""

    by: str
    observed: str
    at: str


class Result(NamedTuple):
    """What a row's facts mean."""

    row: Row
    status: Status
    facts: tuple[Fact, ...]
    reason: str = ""
    control: Control | None = None

    @property
    def badness(self) -> float:
        """0 to 1: how far the row counts towards the exposure."""
        return {Status.PASS: 0.0, Status.NOT_APPLICABLE: 0.0, Status.WAIVED: 0.3, Status.UNPROVEN: 0.5}.get(
            self.status, 1.0
        )


def severity(weight: int) -> str:
    """The word for a weight."""
    for least, word in ((CRITICAL, "critical"), (SEVERE, "severe"), (SERIOUS, "serious"), (MODERATE, "moderate")):
        if weight >= least:
            return word
    return "minor"
