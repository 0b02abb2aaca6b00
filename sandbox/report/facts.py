"""All that is known of one dyno when its checks are judged; each reading is made once, when it is first needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property

from sandbox.config import Config
from sandbox.dyno import record as records
from sandbox.dyno import verify
from sandbox.dyno.record import Record
from sandbox.errors import HostError
from sandbox.host import inside, observe
from sandbox.host.cgroup import Cgroup
from sandbox.policy.clauses import Clause
from sandbox.policy.spec import ContainerSpec
from sandbox.report import filter as filters
from sandbox.report import wall
from sandbox.report.model import Fact, Row, Tier
from sandbox.report.surroundings import Surroundings

# What the prober answered: row, then (attempt, outcome).
Attempts = Mapping[str, list[tuple[str, str]]]
# What arrived where, and what the kernel counted: see stage.
Measured = Mapping[str, object]


class Facts:
    """One dyno under examination. ``attempts``: of a twin, None for a live dyno, which nobody attacks.

    ``around``: what dynos have in common, for a report of many.
    """

    def __init__(
        self,
        config: Config,
        record: Record,
        *,
        pid: int | None = None,
        attempts: Attempts | None = None,
        measured: Measured | None = None,
        calls: filters.Calls = (),
        around: Surroundings | None = None,
    ) -> None:
        self.config, self.record = config, record
        self.pid = record.pid if pid is None else pid
        self.attempts, self.measured = attempts, measured or {}
        self._calls, self.around = calls, around or Surroundings(config)

    @classmethod
    def itself(cls, config: Config, record: Record, calls: filters.Calls) -> Facts:
        """Ourselves in the dyno's place: a process with every right, which every reading must find open."""
        return cls(config, record, pid=os.getpid(), calls=calls)

    @property
    def is_itself(self) -> bool:
        return self.pid == os.getpid()

    @property
    def spec(self) -> ContainerSpec:
        return self.record.spec

    def lives(self) -> bool:
        return self.is_itself or records.still(self.record)

    @cached_property
    def cgroup(self) -> Cgroup:
        return Cgroup.of(self.pid)

    @cached_property
    def pids(self) -> tuple[int, ...]:
        if not self.lives():
            raise HostError("its init is gone.")
        pids = self.cgroup.pids() if not self.is_itself else (self.pid,)
        return tuple(sorted(pids, key=lambda pid: pid != self.pid))

    @cached_property
    def subject(self) -> verify.Subject:
        return verify.Subject(
            self.spec, self.record.user_namespace, self.pids, self.cgroup, self.config, self.record.place
        )

    @cached_property
    def threads(self) -> list[observe.Thread]:
        return self.subject.threads

    @cached_property
    def mounts(self) -> list[observe.MountLine]:
        return self.subject.mounts

    @cached_property
    def filter(self) -> filters.Reading:
        if self.is_itself:
            return filters.without(self.config, self._calls)
        return filters.read(self.config, self.pid, self._calls)

    @cached_property
    def at_the_gate(self) -> frozenset[str]:
        """What its processes held before the app's first instruction."""
        return frozenset(item.partition(": ")[2] for item in self.record.descriptors)

    @cached_property
    def user_limits(self) -> dict[str, int]:
        return inside.user_limits(self.pid)

    @cached_property
    def wall(self) -> wall.Reading:
        if self.record.place is None:
            raise HostError("it has no place in the network: the clause was waived.")
        return wall.read(self.config, self.pid, self.record.place, self.around.wall)

    @cached_property
    def others(self) -> list[Record]:
        """Every other live dyno of this instance."""
        mine = self.spec.container_id
        return [other for other in self.around.living if other.spec.container_id != mine]

    def others_namespaces(self) -> Iterator[tuple[Record, dict[str, int]]]:
        """The namespaces of the others, by kind; what has ended shares nothing."""
        for other in self.others:
            if found := self.around.namespaces(other):
                yield other, found

    def clause(self, clause: Clause, observed: Callable[[], str]) -> Iterator[Fact]:
        """What the check before the start says now: one fact that holds, or one for each difference."""
        found = list(verify.CHECKS[clause](self.subject))
        for promised, seen in found:
            yield Fact(Tier.KERNEL, clause.value, promised, seen, holds=False)
        if not found:
            yield Fact(Tier.KERNEL, clause.value, clause.promise, observed(), holds=True)

    def tried(self, row: Row, key: str = "", accepts: tuple[str, ...] = ()) -> Iterator[Fact]:
        """The prober's attempts for a row; an outcome that is not the expected one does not hold."""
        accepts = accepts or row.accepts
        if self.attempts is None or not accepts:
            return
        answers = self.attempts.get(key or row.id)
        promised = " or ".join(accepts)
        if not answers:
            yield Fact(Tier.TWIN, "attempt", promised, "none", None, "the prober gave no answer for it")
        for what, outcome in answers or ():
            yield Fact(Tier.TWIN, what, promised, outcome, outcome in accepts)

    def answer(self, key: str, what: str) -> str | None:
        """One outcome of the prober; None when there was no twin."""
        if self.attempts is None:
            return None
        for attempt, outcome in self.attempts.get(key, ()):
            if attempt == what:
                return outcome
        raise HostError(f"the prober gave no answer for {key}: {what}.")

    def emulated(self, row: Row) -> Iterator[Fact]:
        """What the live filter does to the row's calls."""
        for call, arguments in row.calls:
            said = self.filter.verdict(call, arguments)
            words = filters.spelled(call, arguments)
            # LOG, TRACE and USER_NOTIF let a call run, or let somebody decide.
            refused = said.startswith(("ERRNO", "KILL", "TRAP"))
            yield Fact(Tier.KERNEL, f"filter: {words}", "refused", said, refused)
