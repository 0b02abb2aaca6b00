"""Who runs twins: forked processes with a network of their own, so that nothing of a weakened wall meets the host."""

from __future__ import annotations

import fcntl
import json
import os
import selectors
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from sandbox.config import Config
from sandbox.dyno.record import Record
from sandbox.errors import HostError, SandboxError
from sandbox.host import syscalls as sys
from sandbox.report import judge, packets, rows, session, usage
from sandbox.report import twin as twins
from sandbox.report.facts import Facts
from sandbox.report.model import Fact, Result, Status, Tier
from sandbox.report.mutants import Mutant
from sandbox.report.rows import identity
from sandbox.report.rows.kernel import known_holes
from sandbox.report.rows.network import ROUTED
from sandbox.report.session import Json
from sandbox.report.stage import PUBLIC, Stage
from sandbox.report.twin import Twin, Wanted

_TASK_S = 600.0  # an emulated processor takes twenty times as long as this machine's


class Child:
    """A forked process that does one thing, and says what comes of it line by line of JSON."""

    def __init__(self, action: Callable[[Callable[[Json], None]], None]) -> None:
        self._fd, write_end = os.pipe()
        self._buffer = b""
        self._pid = os.fork()
        if self._pid == 0:  # pragma: no cover - the child never returns
            status = 1
            try:
                sys.become_child()
                os.close(self._fd)
                action(lambda value: _say(write_end, value))
                status = 0
            except SandboxError as error:
                _say(write_end, {"failed": error.message})
            except BaseException as error:  # noqa: BLE001 - a report says what broke, and goes on
                _say(write_end, {"failed": f"{type(error).__name__}: {error}"})
            finally:
                os._exit(status)
        os.close(write_end)

    def fileno(self) -> int:
        return self._fd

    def read(self) -> list[Json] | None:
        """What it has said by now; None when it has ended."""
        piece = os.read(self._fd, 1 << 20)
        if not piece:
            return None
        *lines, self._buffer = (self._buffer + piece).split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        """It ends by itself once it has said all; one that nobody listens to any more is told to."""
        os.close(self._fd)
        deadline = time.monotonic() + 20.0
        while not os.waitpid(self._pid, os.WNOHANG)[0]:
            if time.monotonic() > deadline:
                os.kill(self._pid, signal.SIGKILL)
            time.sleep(0.01)


def answers_of(children: Sequence[Child]) -> Iterator[Json]:
    """What several children say, as it comes. HostError when all are silent for too long."""
    waiting = selectors.DefaultSelector()
    for child in children:
        waiting.register(child, selectors.EVENT_READ, child)
    try:
        while waiting.get_map():
            ready = waiting.select(_TASK_S)
            if not ready:
                raise HostError(f"a twin did not end within {_TASK_S:.0f} s.", hint="sandbox doctor")
            for key, _ in ready:
                said = key.data.read()
                if said is None:
                    waiting.unregister(key.fileobj)
                else:
                    yield from said
    finally:
        waiting.close()
        for child in children:
            child.close()


def _say(fd: int, value: Json) -> None:
    data = json.dumps(value).encode() + b"\n"
    while data:
        data = data[os.write(fd, data) :]


@contextmanager
def stage(home: Config) -> Iterator[tuple[Config, Stage]]:
    """An instance for twins and its stage, in a network namespace of the calling process."""
    sys.unshare(sys.CLONE_NEWNET)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="stage-", dir=home.run_dir))
        # Held as long as we live: see twin.forsaken.
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, lock)
        fcntl.flock(lock, fcntl.LOCK_EX)
        place = Stage(folder)
        stack.callback(place.close)
        config = stack.enter_context(twins.instance(home))
        yield config, place


def examine_twin(home: Config, wanted: Wanted) -> Json:
    """Every check on one twin: what the kernel says, what was tried, what use came to."""

    def work(say: Callable[[Json], None]) -> None:
        with stage(home) as (config, place):
            begin = time.monotonic()
            earlier = Twin(config, home, wanted)
            session.quick(earlier, home, groups=("files",))  # leaves a marker in its files
            earlier.close()
            twin = Twin(config, home, wanted)
            try:
                say(_whole(twin, place, config, home, begin))
            finally:
                twin.close()

    return _last(answers_of([Child(work)]))


def _whole(twin: Twin, place: Stage, config: Config, home: Config, begin: float) -> Json:
    contexts = session.aio()
    attempts = session.quick(twin, home)
    measured: Json = {"aio": (contexts, session.aio())}
    if twin.record.place:
        measured["LOG-06"] = packets.logged(twin, config)
        measured |= packets.names(twin, lambda: measured.update(packets.network(twin, place, config)))
    if cut := packets.changed(twin, place, config):
        measured["NET-23"] = cut
    # While the twin is kept busy; it is over before processors are measured.
    ourselves = Child(lambda say: say(itself(config, twin.record)))
    answers, used = usage.limits(twin)
    attempts |= answers
    measured |= used
    usage.flood(twin, measured)
    figures = twin.cgroup.usage()._asdict()
    last = twin.facts(attempts, measured, rows.CALLS)
    results = {row.id: judge.examine(row, last) for row in rows.ALL}
    if twin.record.place:
        measured["NET-28"] = packets.vanished(twin, place, config)
    measured["PRV-22"] = twins.stubborn(twin)
    measured["LOG-05"] = measured["PRV-22"]["seconds"]
    # These need what came last; the twin is gone, so only what was measured is read again.
    for name in ("PRV-22", "LOG-05"):
        results[name] = judge.examine(rows.BY_ID[name], last)
    results["NET-28"] = _with_vanished(results["NET-28"], last)
    measured["controls"] |= _own_controls(measured, attempts) | identity.samples() | _said(ourselves)
    return {
        "results": [as_json(result) for result in results.values()],
        "usage": figures,
        "measured": measured,
        "errors": attempts.get("errors", []),
        "seconds": round(time.monotonic() - begin, 2),
    }


def itself(config: Config, record: Record) -> dict[str, str]:
    """Which rows find this very process open: one with every right, examined in the dyno's place."""
    facts = Facts.itself(config, record, rows.CALLS)
    leak = os.open("/", os.O_PATH | os.O_CLOEXEC)  # whether we hold a file of the host is up to our caller otherwise
    try:
        found = judge.reds(judge.examine(row, facts) for row in rows.ALL)
    finally:
        os.close(leak)
    # That we are behind no router says nothing about what would be seen of one that is weakened.
    found = {row: seen for row, seen in found.items() if not seen.startswith(ROUTED)}
    return {row: f"the same reading of our own process: {seen}" for row, seen in found.items()}


def _own_controls(measured: Json, attempts: Json) -> dict[str, str]:
    """Where an experiment holds its own control: what was seen to be otherwise in the same run."""
    found: dict[str, str] = {}
    stop = measured["PRV-22"]
    if stop["after_term"] > 1:
        text = f"after SIGTERM {stop['after_term']} processes lived on"
        found |= {"PRV-22": text, "LOG-05": text}
    if ["a marker of its own", "ok"] in [list(item) for item in attempts.get("FS-20", [])]:
        found["FS-20"] = "a marker of its own was there within the twin"
    if measured.get("NET-23", {}).get("before"):
        found["NET-23"] = "before the change, what was sent on the same flow arrived"
    for row, source in (("NET-19", "NET-19-names"), ("NET-20", "NET-20")):
        if any(item["observed"] == PUBLIC for item in measured.get(source, ())):
            found[row] = f"a name with a public address resolved to {PUBLIC}"
    old = [fact for fact in known_holes("3.10.0") if fact.holds is False]
    if old:
        found["KRN-31"] = f"the same table for Linux 3.10: {old[0].what} open"
    return found


def _with_vanished(result: Result, facts: Facts) -> Result:
    """The result with the attempts that were made after the kernel's state was read."""
    from sandbox.report.rows.network import said

    more = (*result.facts, *said(facts, "NET-28"))
    return judge.conclude(result.row, list(more), facts)


def run_mutants(home: Config, wanted: Wanted, parts: Sequence[Sequence[Mutant]], known: judge.Known) -> Iterator[Json]:
    """Each mutant of each part: what turned red, and what should have and did not. The parts are run side by side."""

    def start(mutants: Sequence[Mutant]) -> Child:
        def work(say: Callable[[Json], None]) -> None:
            with stage(home) as (config, place):
                for mutant in mutants:
                    say(_one(mutant, config, home, wanted, place, known))

        return Child(work)

    yield from answers_of([start(part) for part in parts])


def _one(mutant: Mutant, config: Config, home: Config, wanted: Wanted, place: Stage, known: judge.Known) -> Json:
    from sandbox.report.mutants import catches

    begin = time.monotonic()
    found: Json = {"mutant": mutant.name, "says": mutant.says, "reds": {}, "missed": sorted(mutant.must), "sloppy": []}
    if reason := mutant.impossible(wanted):
        return {**found, "impossible": reason, "missed": []}
    try:
        reds = _reds(mutant, config, home, wanted, place, known)
    except (SandboxError, OSError) as error:
        found["failed"] = str(error)
    else:
        missed, sloppy = catches(mutant, frozenset(reds))
        found |= {"reds": dict(sorted(reds.items())), "missed": missed, "sloppy": sloppy}
    found["seconds"] = round(time.monotonic() - begin, 2)
    return found


def _reds(
    mutant: Mutant, config: Config, home: Config, wanted: Wanted, place: Stage, known: judge.Known
) -> dict[str, str]:
    twin = Twin(config, home, wanted, mutant.weakness)
    try:
        if mutant.live is not None:
            mutant.live(twin)
        return _read(twin, mutant, config, home, place, known)
    finally:
        twin.close()
        if mutant.rules:
            twins.remove_router(config)


def _read(twin: Twin, mutant: Mutant, config: Config, home: Config, place: Stage, known: judge.Known) -> dict[str, str]:
    if mutant.host:
        return _elsewhere(twin, mutant, known)
    attempts: Json | None = None
    measured: Json = {}
    if mutant.groups:
        attempts = session.quick(twin, home, groups=mutant.groups, gentle=mutant.gentle)
    if mutant.limits:
        answers, used = usage.limits(twin, only=mutant.limits)
        attempts = {**(attempts or {}), **answers}
        measured |= used
    if mutant.network:
        measured |= packets.network(twin, place, config)
    if mutant.rules and not mutant.vanish and twin.record.place is not None:
        measured["LOG-06"] = packets.logged(twin, config)
    facts = twin.facts(attempts, measured, rows.CALLS)
    results = {row.id: judge.examine(row, facts) for row in rows.ALL}
    if mutant.vanish:
        measured["NET-28"] = packets.vanished(twin, place, config)
        results["NET-28"] = _with_vanished(results["NET-28"], facts)
    return judge.reds(results.values(), known)


def _elsewhere(twin: Twin, mutant: Mutant, known: judge.Known) -> dict[str, str]:
    """With files of the host that read otherwise: binds in a mount namespace of a child, which nobody else sees."""

    def work(say: Callable[[Json], None]) -> None:
        sys.unshare(sys.CLONE_NEWNS)
        sys.mount("", "/", "", sys.MS_PRIVATE | sys.MS_REC)
        sys.mount("tmpfs", "/mnt", "tmpfs", 0)
        for number, (path, content) in enumerate(mutant.host):
            if not os.path.exists(path):
                raise HostError(f"{path} was refused: this kernel does not have it.")
            with open(f"/mnt/{number}", "w", encoding="ascii") as file:
                file.write(content)
            sys.mount(f"/mnt/{number}", path, "", sys.MS_BIND)
        facts = twin.facts(None, {}, rows.CALLS)
        say(judge.reds((judge.examine(row, facts) for row in rows.ALL), known))

    return _said(Child(work))


def _said(child: Child) -> Json:
    """What a child says at its end. HostError when that is why it failed."""
    answer = _last(answers_of([child]))
    if "failed" in answer:
        raise HostError(str(answer["failed"]))
    return answer


def _last(answers: Iterator[Json]) -> Json:
    found: Json | None = None
    for answer in answers:
        found = answer
    if found is None:
        raise HostError("a twin ended without an answer.", hint="sandbox doctor")
    return found


def from_json(value: Json) -> Result:
    """The result that ``as_json`` wrote."""
    facts = tuple(Fact(Tier(fact[0]), *fact[1:]) for fact in value["facts"])
    return Result(rows.BY_ID[value["id"]], Status(value["status"]), facts, value["reason"])


def as_json(result: Result) -> Json:
    """A result as it crosses a pipe."""
    return {
        "id": result.row.id,
        "status": result.status.value,
        "reason": result.reason,
        "facts": [[fact.tier.value, *fact[1:]] for fact in result.facts],
    }
