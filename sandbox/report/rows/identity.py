"""Identity, logs and side channels."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator

from sandbox.host import observe
from sandbox.policy.clauses import Clause
from sandbox.policy.spec import UIDS_PER_DYNO
from sandbox.report.facts import Facts
from sandbox.report.model import CRITICAL, MINOR, MODERATE, SERIOUS, Area, Fact, Row
from sandbox.report.rows.common import STOP_S, absent, host, kernel, measured, read_host, switch, twin

_FIX = "restart the dyno; if it comes back, `sandbox doctor`"
_HOSTILE = "<script>alert(1)</script>\x1b[2J\x9b31m]]>&\"'\u2028\u202e"
_PR_SCHED_CORE, _PR_SCHED_CORE_GET = 62, 0


def _ranges(facts: Facts) -> Iterator[Fact]:
    first = facts.spec.uid_base
    last = first + UIDS_PER_DYNO - 1
    used = sorted({uid for thread in facts.threads for uid in (*thread.uids, *thread.gids)})
    outside = [uid for uid in used if not first <= uid <= last]
    yield kernel(
        "host ids of its threads", f"{first} to {last}", ", ".join(map(str, outside or used)), holds=not outside
    )
    for other in facts.others:
        meets = other.spec.uid_base < first + UIDS_PER_DYNO and first < other.spec.uid_base + UIDS_PER_DYNO
        yield kernel(
            f"its range and that of {other.name}", "apart", "they overlap" if meets else "apart", holds=not meets
        )


def _numbers(facts: Facts) -> Iterator[Fact]:
    """No id comes from an app or a command line: it is drawn from our own range, and read back from the kernel."""
    uid = facts.spec.host_uid
    good = 100_000 <= uid < 2**31 - 1
    seen = {thread.uids for thread in facts.threads}
    yield kernel(
        "real, effective, saved and file system id",
        f"{uid} four times",
        f"{sorted(seen)}"[:60],
        holds=good and seen == {(uid,) * 4},
    )


def _secrets(facts: Facts) -> Iterator[Fact]:
    names = facts.record.env_names
    found = sorted(os.environ) if facts.is_itself else _variables(facts)
    # Of the shells and runtimes on the way: runc adds HOME, Docker HOSTNAME, Python's start LC_CTYPE.
    gate = {"PATH", "TERM", "PWD", "SHLVL", "_", "OLDPWD", "HOME", "HOSTNAME", "LC_CTYPE"}
    extra = [name for name in found if name not in (*names, *gate)]
    yield kernel(
        "variables at its init", "none but the runtime's own", ", ".join(extra[:4]) or ", ".join(found), holds=not extra
    )
    said = facts.answer("IDN-03", "the supervisor's secret")
    if said is not None:
        yield twin("a secret of the supervisor", "nowhere", said, holds=said == "nowhere")
        keys = facts.answer("IDN-03", "keys")
        yield twin("/proc/keys", "empty", str(keys), holds=keys in ("empty", "ENOENT", "EACCES"))
        seen = (facts.answer("IDN-03", "variables") or "").split()
        strange = [name for name in seen if name not in (*names, *gate)]
        yield twin(
            "variables of the app",
            "those it was given",
            ", ".join(strange[:4]) or f"{len(seen)} of its own",
            holds=not strange,
        )


def _variables(facts: Facts) -> list[str]:
    with open(f"/proc/{facts.pid}/environ", "rb") as file:
        return sorted(item.partition(b"=")[0].decode("utf-8", "replace") for item in file.read().split(b"\0") if item)


def _co_residence(_: Facts) -> Iterator[Fact]:
    yield absent(
        "boot_id, and totals of load, memory and processes, in the policy",
        "shown",
        "not promised: two apps can find out that they share a host",
    )


def _programs(facts: Facts) -> Iterator[Fact]:
    """Every program that runs lies on the dyno's own mounts; one from memory is said, and allowed."""
    own = {line.mount_id for line in facts.mounts} if not facts.is_itself else set()
    strange, count = [], 0
    for pid in facts.pids:
        try:
            mount = observe.mount_of(f"/proc/{pid}/exe")
            memory = "memfd:" in os.readlink(f"/proc/{pid}/exe")
        except OSError:
            continue
        count += 1
        if mount not in own and not memory:
            strange.append(str(pid))
    yield kernel(
        "processes that run a program from elsewhere",
        "none",
        ", ".join(strange[:3]) or f"none of {count}",
        holds=not strange and count > 0,
    )


def _inert(facts: Facts) -> Iterator[Fact]:
    """The name that the twin gave to a process, and worse, through every format of this report."""
    from sandbox.report.render import escape_check

    if facts.attempts is None:
        return
    for name, open_ in escape_check(_HOSTILE).items():
        yield host(f"hostile text in {name}", "inert", open_ or "inert", holds=not open_)


_ESCAPES = f"{_HOSTILE}\x1b]52;c;aGk=\x07\n".encode()
_FORGED = b"x\r2030-01-01T00:00:00 heroku[web.1]: forged\n\x0b\x0c\xe2\x80\xa8heroku[web.1]: forged\n"


def _controls_in(out: bytes) -> list[str]:
    return sorted({f"{byte:#x}" for byte in out if (byte < 0x20 and byte not in (9, 10)) or byte == 0x7F})


def _loose_lines(out: bytes) -> list[str]:
    return [line for line in out.decode("utf-8", "replace").splitlines() if "app[web.1]: " not in line]


def samples() -> dict[str, str]:
    """What the checks of our own output say of bytes that did not pass through it: they must find them open."""
    from sandbox.report.render import open_text

    line = b"\0\xff" * (32768 * 4)
    found = {
        "LOG-02": ", ".join(_controls_in(_ESCAPES)),
        "LOG-03": ", ".join(_loose_lines(_FORGED))[:60],
        "LOG-04": f"{len(line)} bytes" if len(line) > _LONGEST else "",
        "IDN-06": open_text(_HOSTILE),
    }
    return {row: f"the same text unescaped: {text!r}" for row, text in found.items() if text}


_LONGEST = 65536


def _display(facts: Facts) -> Iterator[Fact]:
    if facts.attempts is None:
        return
    from sandbox.dyno.logs import Framer
    from sandbox.engine.base import Stream

    bad = _controls_in(Framer("web.1").feed(Stream.STDOUT, _ESCAPES))
    yield host(
        "terminal escapes in a log line", "shown, not obeyed", ", ".join(bad) or "shown, not obeyed", holds=not bad
    )


def _forged(facts: Facts) -> Iterator[Fact]:
    if facts.attempts is None:
        return
    from sandbox.dyno.logs import Framer
    from sandbox.engine.base import Stream

    loose = _loose_lines(Framer("web.1").feed(Stream.STDOUT, _FORGED))
    yield host("physical lines without the app's prefix", "none", loose[0][:60] if loose else "none", holds=not loose)


def _long(facts: Facts) -> Iterator[Fact]:
    if facts.attempts is None:
        return
    from sandbox.dyno.logs import Framer
    from sandbox.engine.base import Stream

    framer, longest = Framer("web.1"), 0
    for _index in range(4):
        for line in framer.feed(Stream.STDOUT, b"\0\xff" * 32768).splitlines():
            longest = max(longest, len(line))
    yield host(
        "the longest line made of 256 KiB without a newline", "at most 64 KiB", longest, holds=0 < longest <= _LONGEST
    )


def _flood(facts: Facts) -> Iterator[Fact]:
    found = measured(facts, "LOG-01")
    if found is not None:
        good = found["grown"] < 32 << 20
        yield host(
            "our memory while the twin floods its output",
            "grows by less than 32 MiB",
            f"{found['grown'] >> 20} MiB for {found['read'] >> 20} MiB",
            holds=good,
        )


def _pipe(facts: Facts) -> Iterator[Fact]:
    found = measured(facts, "LOG-05")
    if found is not None:
        yield host("the stop while a process holds the output open", "ends", f"{found:.2f} s", holds=found < STOP_S)


def _seen(facts: Facts) -> Iterator[Fact]:
    found = measured(facts, "LOG-06")
    if found is not None:
        yield host("a denied packet is counted for the dyno", "within a second", found, holds=found == "counted")


def _smt(facts: Facts) -> Iterator[Fact]:
    active = read_host("/sys/devices/system/cpu/smt/active")
    if active in (None, "0"):
        yield host(
            "SMT", "off, or a cookie of its own", f"smt/active: {active or 'no such file'}", holds=active == "0" or None
        )
        return
    cookie = ctypes.c_ulong()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SCHED_CORE, _PR_SCHED_CORE_GET, facts.pid, 0, ctypes.byref(cookie)) != 0:
        yield kernel("core scheduling cookie", "one of its own", "this kernel has no core scheduling", holds=False)
        return
    yield kernel("core scheduling cookie", "one of its own", f"{cookie.value:#x}", holds=cookie.value != 0)


def _no_cookie(_: Facts, fact: Fact) -> str:
    return "the policy does not promise it: switch SMT off where neighbours must not measure each other"


def _ksm(_: Facts) -> Iterator[Fact]:
    yield from switch("/sys/kernel/mm/ksm/run", ("0",), "this kernel merges no pages")


def _energy(facts: Facts) -> Iterator[Fact]:
    said = facts.answer("SCH-03", "rdpmc")
    if said is not None:
        yield twin("rdpmc", "SIGSEGV", said, holds=said == "SIGSEGV")
    if os.path.exists("/proc/sys/kernel/perf_event_paranoid"):
        seen = os.path.exists(f"/proc/{facts.pid}/root/sys/class/powercap")
        yield kernel("/sys/class/powercap", "not there", "there" if seen else "not there", holds=not seen)


ROWS = (
    Row("IDN-01", Area.IDENTITY, "a range of ids that nobody shares", "No other app runs under this app's ids.", CRITICAL,
        "CIS-Docker:2.9", _FIX, "none", _ranges, clause=Clause.UID),
    Row("IDN-02", Area.IDENTITY, "no id by overflow", "No trick with numbers makes this app another user.", SERIOUS,
        "CVE-2024-40635", _FIX, "none", _numbers, clause=Clause.UID),
    Row("IDN-03", Area.IDENTITY, "no secrets but its own", "No credential of the platform or of others is in reach.",
        CRITICAL, "ATT&CK:T1552.001 CIS-Docker:4.10", _FIX, "none", _secrets),
    Row("IDN-04", Area.IDENTITY, "sharing a host can be noticed", "Not promised: an app can find out who shares its host.",
        MINOR, "ATT&CK:T1082", "", "", _co_residence),
    Row("IDN-05", Area.IDENTITY, "runs programs of its own only", "Every program lies on this app's own file systems.",
        SERIOUS, "", _FIX, "none", _programs),
    Row("IDN-06", Area.IDENTITY, "cannot forge this report", "Names that this app chooses stay text, in every format.",
        SERIOUS, "", "report it: this is a bug of sandbox", "none", _inert),
    Row("LOG-01", Area.LOGS, "a flood of output is bounded", "This app's output cannot use up the host's memory.",
        MODERATE, "", _FIX, "a fast writer waits", _flood),
    Row("LOG-02", Area.LOGS, "output cannot drive a terminal", "Reading this app's log is safe.", MODERATE,
        "CVE-2021-25743", "report it: this is a bug of sandbox", "none", _display),
    Row("LOG-03", Area.LOGS, "log lines cannot be forged", "This app cannot write lines in another's name.", MODERATE,
        "ATT&CK:T1565", "report it: this is a bug of sandbox", "none", _forged),
    Row("LOG-04", Area.LOGS, "endless lines are split", "Nor fill memory with one line.", MINOR, "",
        "report it: this is a bug of sandbox", "none", _long),
    Row("LOG-05", Area.LOGS, "cannot hold up its stop", "Keeping the output open delays nothing.", MINOR, "", _FIX, "none",
        _pipe),
    Row("LOG-06", Area.LOGS, "denied packets are seen", "What this app tries and may not leaves a trace.", MODERATE,
        "ATT&CK:T1562", "sandbox firewall denied", "none", _seen, clause=Clause.NETWORK),
    Row("SCH-01", Area.SIDE_CHANNELS, "shares no processor core", "No neighbour measures this app through a shared core.",
        MINOR, "NIST-800-190:4.5.3", "switch SMT off", "half the hardware threads", _smt, lacks=_no_cookie),
    Row("SCH-02", Area.SIDE_CHANNELS, "shares no memory by content", "No neighbour finds out what is in its memory.", MINOR,
        "", "echo 0 > /sys/kernel/mm/ksm/run", "some memory", _ksm),
    Row("SCH-03", Area.SIDE_CHANNELS, "no energy and cycle counters", "The processor's own meters are out of reach.", MINOR,
        "CVE-2020-8694", _FIX, "none", _energy),
)  # fmt: skip
