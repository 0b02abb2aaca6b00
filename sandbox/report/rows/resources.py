"""Limits: what was promised, what the kernel has, and where use really ended."""

from __future__ import annotations

from collections.abc import Iterator

from sandbox.policy.clauses import Clause
from sandbox.report.facts import Facts
from sandbox.report.model import MINOR, MODERATE, SERIOUS, Area, Fact, Row
from sandbox.report.rows.common import absent, counted, host, kernel, measured, read_host, rlimit, switch, twin
from sandbox.units import format_bytes

_FIX = "restart the dyno; if it comes back, `sandbox doctor`"


def _memory(facts: Facts) -> Iterator[Fact]:
    policy = facts.spec.policy
    yield from facts.clause(Clause.MEMORY, lambda: f"{format_bytes(policy.memory_max_bytes)}")
    found = measured(facts, "memory")
    if found is not None:
        most = policy.memory_max_bytes
        observed = f"{found['said']} at {format_bytes(found['peak'])}, {found['oom_kills']} killed by the kernel"
        good = found["said"] == "SIGKILL" and found["oom_kills"] > 0 and found["peak"] <= most
        yield twin("allocated until killed", f"SIGKILL at {format_bytes(most)}", observed, holds=good)


def _swap(facts: Facts) -> Iterator[Fact]:
    yield from facts.clause(Clause.SWAP, lambda: f"{format_bytes(facts.spec.policy.memory_swap_max_bytes)} with swap")


def _shm(facts: Facts) -> Iterator[Fact]:
    found = measured(facts, "shm_charge")
    if found is not None:
        good = found["charged"] >= 0.9 * found["held"]
        yield twin(
            "memory charged for files in /dev/shm after their writer ended", format_bytes(found["held"]),
            format_bytes(found["charged"]), holds=good,
        )  # fmt: skip


def _kernel_memory(facts: Facts) -> Iterator[Fact]:
    found = measured(facts, "pipes")
    if found is not None:
        good = found["charged"] >= 0.9 * found["held"]
        yield twin(
            "memory charged for full pipes", format_bytes(found["held"]), format_bytes(found["charged"]), holds=good
        )


def _pids(facts: Facts) -> Iterator[Fact]:
    most = facts.spec.policy.pids_max
    yield from facts.clause(Clause.PIDS, lambda: f"pids.max {most}")
    said = facts.answer("RES-05", "fork")
    if said is not None:
        number = int(facts.answer("RES-05", "children") or 0)
        yield twin(
            "forked until refused",
            f"EAGAIN below {most}",
            f"{said} after {number}",
            holds=said == "EAGAIN" and number < most,
        )


def _threads(facts: Facts) -> Iterator[Fact]:
    said = facts.answer("RES-06", "threads")
    if said is not None:
        word, number = counted(said)
        most = facts.spec.policy.pids_max
        yield twin("threads until refused", f"EAGAIN below {most}", said, holds=word == "EAGAIN" and number < most)


def _cpu(facts: Facts) -> Iterator[Fact]:
    policy = facts.spec.policy
    yield from facts.clause(Clause.CPU, lambda: f"{policy.cpu_quota_us} us in 100000, weight {policy.cpu_shares}")
    found = measured(facts, "cpu")
    if found is not None and policy.cpu_quota_us:
        cap = policy.cpu_quota_us / 100_000
        observed = f"{found['cpus']:.2f} CPUs with {found['workers']} busy processes"
        if found["workers"] <= cap:
            why = f"{found['workers']} processors cannot exceed a cap of {cap:g}"
            yield twin("CPUs used at most", f"{cap:g}", observed, holds=None, why=why)
        else:
            yield twin("CPUs used at most", f"{cap:g}", observed, holds=found["cpus"] <= 1.1 * cap)


def _timers(facts: Facts) -> Iterator[Fact]:
    """A cap is only one if nothing that runs for the dyno escapes it: timer interrupts are the usual suspect."""
    found = measured(facts, "timers")
    policy = facts.spec.policy
    if found is not None and policy.cpu_quota_us:
        cap = policy.cpu_quota_us / 100_000
        holds = found["cpus"] <= 1.15 * cap
        yield twin("CPUs used with 200 timers of 1 ns", f"at most {cap:g}", f"{found['cpus']:.2f}", holds=holds)
    limits = facts.subject.limits
    if policy.cpu_quota_us:
        holds = limits.cpu_quota_us == policy.cpu_quota_us
        yield kernel("CPU quota, microseconds", policy.cpu_quota_us, limits.cpu_quota_us, holds=holds)


def _count(facts: Facts, row: str, what: str, words: tuple[str, ...], most: int) -> Iterator[Fact]:
    said = facts.answer(row, what)
    if said is not None:
        word, number = counted(said)
        promised = f"{' or '.join(words)} at {most} or fewer"
        yield twin(what, promised, said, holds=word in words and number <= most)


def _descriptors(facts: Facts) -> Iterator[Fact]:
    yield from rlimit(facts, "NOFILE")
    yield from _count(facts, "RES-08", "open", ("EMFILE",), _limit(facts, "NOFILE"))


def _flight(facts: Facts) -> Iterator[Fact]:
    # Counted per user: 250 at a time, and the pairs of sockets themselves.
    yield from _count(
        facts, "RES-09", "descriptors in flight", ("ETOOMANYREFS", "EMFILE"), _limit(facts, "NOFILE") + 500
    )


def _limit(facts: Facts, name: str) -> int:
    return int(next(limit.hard for limit in facts.spec.policy.rlimits if limit.name == name))


def _ptys(facts: Facts) -> Iterator[Fact]:
    from sandbox.policy.mounts import MAX_TERMINALS

    options = next((line.options for line in facts.mounts if line.target == "/dev/pts"), "")
    most = next((word for word in options.split(",") if word.startswith("max=")), "unlimited")
    yield kernel("/dev/pts", f"max={MAX_TERMINALS}", most, holds=most == f"max={MAX_TERMINALS}")
    yield from _count(facts, "RES-10", "terminals", ("ENOSPC",), MAX_TERMINALS)


def _alone(facts: Facts) -> Iterator[Fact]:
    """Per-user limits are shared by whoever has the same host id."""
    mine = facts.spec.host_uid
    same = [other.name for other in facts.others if other.spec.host_uid == mine]
    used = {uid for thread in facts.threads for uid in thread.uids}
    yield kernel("other dynos with its host id", "none", ", ".join(same) or "none", holds=not same)
    yield kernel(
        "host ids that its threads count under", f"{mine} only", ", ".join(map(str, sorted(used))), holds=used == {mine}
    )


def _pending(facts: Facts) -> Iterator[Fact]:
    yield from rlimit(facts, "SIGPENDING")
    yield from _count(facts, "RES-12", "timers", ("EAGAIN",), _limit(facts, "SIGPENDING"))


def _queues(facts: Facts) -> Iterator[Fact]:
    yield from rlimit(facts, "MSGQUEUE")
    yield from _count(facts, "RES-13", "message queues", ("EMFILE",), 12)


def _locked(facts: Facts) -> Iterator[Fact]:
    yield from rlimit(facts, "MEMLOCK")
    said = facts.answer("RES-14b", "mlock 1 MiB")
    if said is not None:
        yield twin("mlock of 1 MiB", "ENOMEM or EPERM", said, holds=said in ("ENOMEM", "EPERM"))


def _no_io(_: Facts) -> Iterator[Fact]:
    yield absent("an I/O limit in the policy", "none", "not promised: v1 cgroups cannot bound buffered writes")


def _flows(facts: Facts) -> Iterator[Fact]:
    if not facts.record.place:
        return
    wall, traffic = facts.wall, facts.spec.policy.traffic
    for name in ("flows", "new flows"):
        yield kernel(
            f"its limit on {name} in the router",
            "set",
            "set" if wall.members.get(name) else "missing",
            holds=wall.members.get(name, False),
        )
    rule = f"counted_{traffic.flows} {{ iifname ct count over {traffic.flows}"
    yield kernel(
        "the rule that counts flows", "there", "there" if rule in wall.rules else "missing", holds=rule in wall.rules
    )


def _source_ports(facts: Facts) -> Iterator[Fact]:
    if facts.record.place:
        most = facts.spec.policy.traffic.flows
        good = facts.wall.members.get("flows", False) and most < 28_000
        yield kernel("its flows of 28,000 source ports", "a part", f"at most {most}" if good else "all", holds=good)


def _neighbours(facts: Facts) -> Iterator[Fact]:
    if facts.record.place is None:
        return
    known = list(facts.wall.neighbours) if not facts.is_itself else ["every host that was ever asked"]
    yield kernel(
        "entries of its neighbour table",
        str(facts.record.place.gateway),
        ", ".join(known) or "none",
        holds=known == [str(facts.record.place.gateway)],
    )


def _cgroups(facts: Facts) -> Iterator[Fact]:
    said = facts.answer("FS-28", "mkdir in /sys/fs/cgroup")
    if said is not None:
        yield twin("mkdir in /sys/fs/cgroup", "EROFS", said, holds=said in ("EROFS", "ENOENT", "EACCES"))
    mounted = [line.target for line in facts.mounts if line.fstype.startswith("cgroup")]
    yield kernel("cgroup file systems that it sees", "none", ", ".join(mounted[:2]) or "none", holds=not mounted)


def _log_flood(_: Facts) -> Iterator[Fact]:
    rate = read_host("/proc/sys/kernel/printk_ratelimit")
    if rate is None:
        yield absent("/proc/sys/kernel/printk_ratelimit", "no such file", "this kernel does not say")
    else:
        good = rate.isdigit() and int(rate) > 0
        yield host("kernel.printk_ratelimit", "more than 0", rate, holds=good)
    yield from switch("/proc/sys/kernel/print-fatal-signals", ("0",), "this kernel does not print them")


def _audit(_: Facts) -> Iterator[Fact]:
    yield absent(
        "the log flag of the filter", "not asked for", "refused calls make no audit records: nothing can flood"
    )


ROWS = (
    Row("RES-01", Area.RESOURCES, "memory ends at the limit", "This app cannot take memory that others need.", SERIOUS,
        "CIS-Docker:5.11 ATT&CK:T1499", _FIX, "the app is killed at the limit", _memory, clause=Clause.MEMORY),
    Row("RES-02", Area.RESOURCES, "swap ends at the limit", "Nor hide it in swap.", SERIOUS, "CIS-Docker:5.11", _FIX,
        "the app is killed at the limit", _swap, clause=Clause.SWAP),
    Row("RES-03", Area.RESOURCES, "shared memory is charged", "Files in memory count, also after their writer ended.",
        MODERATE, "", _FIX, "", _shm),
    Row("RES-04", Area.RESOURCES, "kernel memory is charged", "Memory that the kernel holds for this app counts.",
        MODERATE, "", _FIX, "", _kernel_memory),
    Row("RES-05", Area.RESOURCES, "processes end at the limit", "This app cannot flood the host with processes.", SERIOUS,
        "CIS-Docker:5.29 ATT&CK:T1499.001", _FIX, "fork fails at the limit", _pids, clause=Clause.PIDS),
    Row("RES-06", Area.RESOURCES, "threads end at the limit", "Nor with threads.", SERIOUS, "CIS-Docker:5.29", _FIX,
        "threads fail at the limit", _threads, clause=Clause.PIDS),
    Row("RES-07", Area.RESOURCES, "CPU time ends at the cap", "This app cannot take the processor from others.", SERIOUS,
        "CIS-Docker:5.12 ATT&CK:T1496", _FIX, "the app is slowed down", _cpu, clause=Clause.CPU),
    Row("RES-08", Area.RESOURCES, "open files end at the limit", "This app cannot use up the host's open files.", MODERATE,
        "CIS-Docker:5.19 CIS-Docker:2.8", _FIX, "open fails at the limit", _descriptors, clause=Clause.RLIMITS),
    Row("RES-09", Area.RESOURCES, "files in flight end at the limit", "Nor hide them in sockets.", MODERATE, "", _FIX, "",
        _flight, clause=Clause.RLIMITS),
    Row("RES-10", Area.RESOURCES, "terminals end at the limit", "This app cannot use up the host's terminals.", MODERATE,
        "", _FIX, "", _ptys, clause=Clause.MOUNTS),
    Row("RES-11", Area.RESOURCES, "nobody shares its user limits", "Limits per user are this app's alone.", SERIOUS, "",
        _FIX, "", _alone, clause=Clause.UID),
    Row("RES-12", Area.RESOURCES, "timers end at the limit", "Pending signals and timers are bounded.", MINOR, "", _FIX,
        "", _pending, clause=Clause.RLIMITS),
    Row("RES-13", Area.RESOURCES, "message queues end at the limit", "Queues in the kernel are bounded.", MODERATE,
        "CIS-Docker:5.17", _FIX, "", _queues, clause=Clause.RLIMITS),
    Row("RES-14", Area.RESOURCES, "cannot pin memory", "Memory that cannot be swapped, and huge pages, are bounded.",
        MODERATE, "", _FIX, "", _locked, accepts=("EPERM",), calls=(("mmap", (0, 1 << 21, 3, 0x40022)),),
        clause=Clause.RLIMITS),
    Row("RES-15", Area.RESOURCES, "disk bandwidth", "Not promised: a busy app can slow down the host's disk.", MINOR,
        "ATT&CK:T1499", "", "", _no_io),
    Row("RES-16", Area.RESOURCES, "unwritten data", "Not promised: unwritten data counts as memory, its speed is free.",
        MINOR, "", "", "", _no_io),
    Row("RES-17", Area.RESOURCES, "network flows end at the limit", "This app cannot fill the host's table of connections.",
        SERIOUS, "ATT&CK:T1498", "sandbox firewall show", "new connections fail at the limit", _flows,
        clause=Clause.NETWORK),
    Row("RES-18", Area.RESOURCES, "cannot use up source ports", "Others can still connect to what this app connects to.",
        MODERATE, "", "sandbox firewall show", "", _source_ports, clause=Clause.NETWORK),
    Row("RES-19", Area.RESOURCES, "one neighbour only", "This app cannot fill the host's table of neighbours.", MODERATE,
        "", "sandbox firewall show", "", _neighbours, clause=Clause.NETWORK),
    Row("RES-20", Area.RESOURCES, "cannot make cgroups", "This app cannot grow the kernel's tree of groups.", MODERATE, "",
        _FIX, "", _cgroups),
    Row("RES-21", Area.RESOURCES, "cannot flood the kernel log", "What the kernel logs about this app is bounded.", MINOR,
        "ATT&CK:T1070", "sysctl -w kernel.printk_ratelimit=5 kernel.print-fatal-signals=0", "", _log_flood),
    Row("RES-22", Area.RESOURCES, "cannot flood the audit log", "Refused calls write no records.", MINOR, "ATT&CK:T1562",
        "", "", _audit),
    Row("RES-23", Area.RESOURCES, "timer storms are charged", "Interrupts that this app asks for cost its own time.",
        MINOR, "", _FIX, "", _timers, clause=Clause.CPU),
)  # fmt: skip
