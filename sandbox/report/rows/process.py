"""Process, privilege and the system-call interface."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress

from sandbox.dyno import verify
from sandbox.errors import HostError
from sandbox.host import observe
from sandbox.host.cgroup import Cgroup
from sandbox.policy import mounts
from sandbox.policy.clauses import Clause
from sandbox.report.facts import Facts
from sandbox.report.model import CRITICAL, MINOR, MODERATE, SERIOUS, SEVERE, Area, Fact, Row
from sandbox.report.rows.common import STOP_S, absent, calls, host, kernel, measured, read_host, rlimit, twin

_RESTART = "restart the dyno; if it comes back, `sandbox doctor`"
_NONE = "none for web apps"


def _capabilities(facts: Facts) -> Iterator[Fact]:
    yield from facts.clause(Clause.CAPABILITIES, lambda: f"all {len(facts.threads)} threads: Cap* = 0")


def _nnp(facts: Facts) -> Iterator[Fact]:
    yield from facts.clause(Clause.NO_NEW_PRIVILEGES, lambda: f"all {len(facts.threads)} threads: NoNewPrivs 1")


def _uid(facts: Facts) -> Iterator[Fact]:
    spec = facts.spec
    yield from facts.clause(Clause.UID, lambda: f"all {len(facts.threads)} threads: host uid {spec.host_uid}")
    yield kernel("host uid", "at least 100000", spec.host_uid, holds=spec.host_uid >= 100_000)


def _user_namespace(facts: Facts) -> Iterator[Fact]:
    mine, ours = observe.namespace(facts.pid, "user"), observe.namespace("self", "user")
    yield kernel("user namespace", "not the host's", "the host's" if mine == ours else mine, holds=mine != ours)
    for other, namespaces in facts.others_namespaces():
        theirs = namespaces["user"]
        yield kernel(f"against {other.name}", "another", "the same" if theirs == mine else theirs, holds=theirs != mine)


def _no_user_namespace(facts: Facts, fact: Fact) -> str:
    if facts.record.user_namespace:
        return ""
    return (
        f"{facts.record.engine} has one user namespace for all containers; the promise is kept by a host uid that "
        f"no other dyno has ({facts.spec.host_uid}, see IDN-01)"
    )


def _nosuid(facts: Facts) -> Iterator[Fact]:
    # A device or a mask bound over a file is nothing that could be executed.
    files = {*mounts.MASKED, *(f"/dev/{name}" for name, _, _ in mounts.DEVICES)}
    # Nor is anything in procfs and sysfs, by the kernel's own word (SB_I_NOEXEC); crun 1.8 binds parts of /proc loosely.
    mounted = [line for line in facts.mounts if line.fstype not in ("proc", "sysfs") and line.target not in files]
    loose = [line.target for line in mounted if "nosuid" not in line.flags]
    yield kernel("mounts without nosuid", "none", ", ".join(loose[:4]) or "none", holds=not loose)


def _filter(facts: Facts) -> Iterator[Fact]:
    reading = facts.filter
    yield from facts.clause(Clause.SECCOMP, lambda: f"all {len(facts.threads)} threads: mode 2")
    for difference in reading.differences[:10]:
        yield kernel("filter", "as the policy says", difference, holds=False)
    if not reading.differences:
        yield kernel(
            "filter of init",
            "what the policy says, for every call and argument that matters",
            f"sha256 {reading.digest[:12]}, {reading.instructions} instructions: {reading.allowed} calls pass, "
            f"0 i386, 0 x32; init stood still for {reading.stopped_ms} ms",
            holds=True,
        )
    yield from _entered(facts)


def _unknown(facts: Facts) -> Iterator[Fact]:
    count = facts.filter.unknown
    yield kernel("calls above the last known one that pass the filter", 0, count, holds=count == 0)


def _entered(facts: Facts) -> Iterator[Fact]:
    """Filters are inherited and cannot be taken off: whoever descends from init is under init's."""
    if facts.is_itself:
        return
    strangers = []
    least = min(thread.seccomp_filters for thread in facts.threads if thread.tid == facts.pid)
    if least < 0:
        yield kernel(
            "filters of each thread", "at least init's", "not said", holds=None, why="the kernel is older than 5.9"
        )
    known = set(facts.pids)
    for pid, parent in verify.living(facts.subject, observe.parent):
        if pid != facts.pid and parent not in known and observe.alive(pid):
            strangers.append(str(pid))
    fewer = [str(t.tid) for t in facts.threads if t.seccomp_filters < least]
    yield kernel("processes that do not descend from init", "none", ", ".join(strangers) or "none", holds=not strangers)
    yield kernel("threads with fewer filters than init", "none", ", ".join(fewer) or "none", holds=not fewer)


def _foreign(facts: Facts) -> Iterator[Fact]:
    count = facts.filter.foreign
    yield kernel("i386 and x32 calls that the filter lets live", 0, count, holds=count == 0)


def _abi32(facts: Facts) -> Iterator[Fact]:
    yield from _foreign(facts)
    yield from _killed(facts, "PRV-11", "int 0x80 getpid")


def _socketcall(facts: Facts) -> Iterator[Fact]:
    yield from _foreign(facts)
    yield from _killed(facts, "PRV-12", "int 0x80 socketcall(AF_VSOCK)")


def _x32(facts: Facts) -> Iterator[Fact]:
    yield from _foreign(facts)
    yield from _killed(facts, "PRV-13", "x32 getpid")


def _killed(facts: Facts, row: str, attempt: str) -> Iterator[Fact]:
    said = facts.answer(row, attempt)
    if said == "SIGSEGV":
        yield absent(attempt, "SIGSEGV", "this kernel has no 32-bit calls")
    elif said is not None:
        yield twin(attempt, "SIGSYS", said, holds=said == "SIGSYS")


def _processes(facts: Facts) -> Iterator[Fact]:
    depth = len(observe.status(facts.pid)["NSpid"].split()) - len(observe.status(os.getpid())["NSpid"].split())
    yield kernel("depth of its process namespace below ours", 1, depth, holds=depth == 1)


def _daemon(facts: Facts) -> Iterator[Fact]:
    """Whoever is in the dyno's process namespace must be in its cgroup, however it was started."""
    outside = _strays(facts, facts.around.processes.get(observe.namespace(facts.pid, "pid"), ()))
    if outside:
        # One that was forked or ends at this moment is in no cgroup; who still is in none a moment later is outside.
        time.sleep(0.05)
        outside = _strays(facts, outside)
    yield kernel(
        "processes of its namespace outside of its cgroup", "none", ", ".join(outside[:5]) or "none", holds=not outside
    )


def _strays(facts: Facts, names: Iterable[str]) -> list[str]:
    mine = observe.namespace(facts.pid, "pid")
    found = []
    for name in names:
        try:
            thread = observe.living_thread(int(name))
            if thread is None or observe.namespace(thread, "pid") != mine:
                continue
            # cgroup v1 places threads one by one.
            tids = [int(tid) for tid in os.listdir(f"/proc/{name}/task")]
            if any(Cgroup.of(tid).paths != facts.cgroup.paths for tid in tids if observe.thread_lives(tid)):
                found.append(name)
        except (HostError, OSError):
            continue
    return found


def _zombies(facts: Facts) -> Iterator[Fact]:
    said = facts.answer("PRV-24", "fork beside zombies")
    if said is not None:
        yield twin("fork beside unreaped children", "EAGAIN", said, holds=said == "EAGAIN")


def _priority(facts: Facts) -> Iterator[Fact]:
    yield from rlimit(facts, "RTPRIO")
    yield from rlimit(facts, "NICE")
    pushed = []
    for thread in facts.threads:
        with suppress(HostError):  # it ended meanwhile
            nice, policy = observe.scheduling(thread.tid)
            if nice < 0 or policy in _REALTIME:
                pushed.append(f"{thread.tid}: nice {nice}, policy {policy}")
    yield kernel("threads that run before others", "none", "; ".join(pushed[:3]) or "none", holds=not pushed)


def _oom(facts: Facts) -> Iterator[Fact]:
    lowest = min(value for _, value in verify.living(facts.subject, observe.oom_score_adj))
    wanted = facts.spec.policy.oom_score
    yield kernel("oom_score_adj", f"at least {wanted}", lowest, holds=lowest >= wanted)


def _terminals(facts: Facts) -> Iterator[Fact]:
    tty = [f"{what}" for fd, what in observe.descriptors(facts.pid).items() if fd < 3 and what.startswith("/dev/tty")]
    yield kernel("standard descriptors on a terminal of the host", "none", ", ".join(tty) or "none", holds=not tty)


_REALTIME = (1, 2, 6)  # sched(7): SCHED_FIFO, SCHED_RR, SCHED_DEADLINE
_NO_FILE = ("pipe:[", "socket:[", "anon_inode:")
_MQUEUE_MAGIC, _NSFS_MAGIC = 0x19800202, 0x6E736673  # linux/magic.h
_MOST_DESCRIPTORS = 20_000


def _descriptors(facts: Facts) -> Iterator[Fact]:
    """Of each process: what it holds must lie on the dyno's own mounts, or lead to no file at all."""
    own = {line.mount_id for line in facts.mounts} if not facts.is_itself else set()
    kinds = () if facts.is_itself else os.listdir(f"/proc/{facts.pid}/ns")
    spaces = {observe.namespace(facts.pid, kind) for kind in kinds}
    memory = os.memfd_create("sandbox", os.MFD_CLOEXEC)
    try:
        # Files without a place: of memory, and of message queues, which belong to its own IPC namespace (KRN-06).
        nowhere, count, strange = os.fstat(memory).st_dev, 0, []
        for pid, tables in verify.living(facts.subject, observe.held):
            for thread, table in tables:
                held = {f"fd/{fd}": what for fd, what in table.items()}
                count += len(held)
                if count > _MOST_DESCRIPTORS:
                    raise HostError(f"it holds more than {_MOST_DESCRIPTORS} descriptors: not all were examined.")
                # What it works in and what it takes for / are as good as a descriptor: CVE-2024-21626.
                for where, what in {**held, "cwd": "its folder", "root": "its root"}.items():
                    path = f"/proc/{thread}/{where}"
                    if what.startswith(_NO_FILE):
                        out = _not_its_own(facts, path, what)
                    else:
                        out = _leads_out(path, own, spaces, nowhere)
                    if out:
                        strange.append(f"{pid}: {where.removeprefix('fd/')} {what}")
    finally:
        os.close(memory)
    yield kernel(
        "descriptors on file systems that are not the dyno's",
        "none",
        "; ".join(strange[:3]) or "none",
        holds=not strange,
    )
    if not facts.is_itself:
        yield from _at_the_gate(facts)


def _not_its_own(facts: Facts, path: str, what: str) -> bool:
    """A socket that our own network namespace lists, or a handle on a process that is none of the dyno's.

    A socket that is bound to nothing is in no list of the kernel: of which namespace it is, nobody says.
    """
    if what.startswith("socket:["):
        return what not in facts.at_the_gate and what[8:-1] in facts.around.sockets
    if what == "anon_inode:[pidfd]":
        with suppress(HostError):
            pid = observe.pidfd(path.replace("/fd/", "/fdinfo/"))
            return pid > 0 and pid not in facts.pids and not _of_its_namespace(facts, pid)
    return False


def _of_its_namespace(facts: Facts, pid: int) -> bool:
    """Of a process that was started since the dyno's were listed; one that is gone is nobody's."""
    try:
        return observe.namespace(pid, "pid") == observe.namespace(facts.pid, "pid")
    except HostError:
        return not observe.alive(pid)


def _leads_out(path: str, own: set[int], spaces: set[int], nowhere: int) -> bool:
    try:
        status = os.stat(path)
        # The null device of the shim, wherever it was opened, leads nowhere either.
        if stat.S_ISCHR(status.st_mode) and status.st_rdev == os.makedev(1, 3):
            return False
        if observe.mount_of(path) in own:
            return False
        kind = observe.file_system(path)
        # A program may open its own namespaces, and no other's.
        return (
            status.st_dev != nowhere and kind != _MQUEUE_MAGIC and not (kind == _NSFS_MAGIC and status.st_ino in spaces)
        )
    except OSError:
        return False  # closed meanwhile


def _at_the_gate(facts: Facts) -> Iterator[Fact]:
    known = ("pipe:[", "socket:[", "/dev/null", "/run/gate/fifo", "/dev/pts/")
    extra = []
    for item in facts.record.descriptors:
        head, _, what = item.partition(": ")
        if not what.startswith(known) or (int(head.split()[1]) > 2 and what != "/run/gate/fifo"):
            extra.append(item)
    yield kernel(
        "descriptors at its start", "its input and output, and the gate", "; ".join(extra[:3]) or "these only",
        holds=not extra,
    )  # fmt: skip


def _launcher(facts: Facts) -> Iterator[Fact]:
    mount = observe.mount_of(f"/proc/{facts.pid}/exe")
    line = next((line for line in facts.mounts if line.mount_id == mount), None)
    flags = line.flags if line is not None else frozenset()
    yield kernel(
        "the mount of init's program", "read-only", "read-only" if "ro" in flags else "writable", holds="ro" in flags
    )


def _core(facts: Facts) -> Iterator[Fact]:
    yield from rlimit(facts, "CORE")
    pattern = read_host("/proc/sys/kernel/core_pattern") or ""
    # For a pipe the kernel ignores a limit of 0 and starts the helper as root, with a core the app wrote.
    # "@" names a socket of a collector, since Linux 6.16; what it gets is the app's memory, too.
    holds = not pattern.startswith(("|", "@")) if pattern else None
    yield host("kernel.core_pattern", "no helper", pattern[:60], holds=holds, why="the kernel does not say")


def _unkillable(facts: Facts) -> Iterator[Fact]:
    found = measured(facts, "PRV-22")
    if found is not None:
        yield host(
            "stubborn processes: before, after SIGTERM, after the stop", "some, some, 0",
            f"{found['before']}, {found['after_term']}, {found['after']} ({found['seconds']:.2f} s)",
            holds=found["after"] == 0 and found["seconds"] < STOP_S,
        )  # fmt: skip


def _memfd(_: Facts) -> Iterator[Fact]:
    yield absent("vm.memfd_noexec in the policy", "not asked for", "not promised: JIT compilers run code from memory")


def _joiner(_: Facts) -> Iterator[Fact]:
    yield absent("commands that enter a live dyno", "none in this release", "nothing of ours joins a running dyno")


ROWS = (
    Row("PRV-01", Area.PROCESS, "no capabilities", "No process of this app has any part of root's power.", CRITICAL,
        "CIS-Docker:5.4 ATT&CK:T1611 NIST-800-190:4.4.3 PSS:restricted", _RESTART, _NONE, _capabilities,
        clause=Clause.CAPABILITIES),
    Row("PRV-02", Area.PROCESS, "no new privileges", "No program that this app starts can gain rights.", CRITICAL,
        "CIS-Docker:5.26 CIS-Docker:2.14 ATT&CK:T1548.001", _RESTART, "setuid programs do nothing", _nnp,
        clause=Clause.NO_NEW_PRIVILEGES),
    Row("PRV-03", Area.PROCESS, "an unprivileged host id", "On the host this app is nobody: an id without files or rights.",
        CRITICAL, "CIS-Docker:4.1 CIS-Docker:2.9 CIS-Docker:5.31", _RESTART, _NONE, _uid, clause=Clause.UID),
    Row("PRV-04", Area.PROCESS, "a user namespace of its own", "Even root inside this app would be nobody on the host.",
        CRITICAL, "CIS-Docker:5.31 NIST-800-190:4.4.3", "use --engine oci", _NONE, _user_namespace,
        clause=Clause.UID, lacks=_no_user_namespace),
    Row("PRV-05", Area.PROCESS, "cannot become another user", "This app cannot take another id.", SERIOUS,
        "ATT&CK:T1548", _RESTART, _NONE, accepts=("EPERM",)),
    Row("PRV-06", Area.PROCESS, "setuid files have no effect", "No file can lend this app its owner's rights.", SERIOUS,
        "CIS-Docker:4.8 ATT&CK:T1548.001", _RESTART, _NONE, _nosuid, clause=Clause.MOUNTS),
    Row("PRV-07", Area.PROCESS, "cannot give files capabilities", "This app cannot prepare a file that carries rights.",
        SERIOUS, "ATT&CK:T1548", _RESTART, _NONE, accepts=("EPERM",)),
    Row("PRV-08", Area.PROCESS, "cannot raise its capabilities", "This app cannot take rights that it was not given.",
        SERIOUS, "CIS-Docker:5.4", _RESTART, _NONE, accepts=("EPERM",)),
    Row("PRV-09", Area.PROCESS, "cannot make setuid files", "This app cannot leave a file that lends rights.", MODERATE,
        "ATT&CK:T1548.001", _RESTART, "installers that set these bits fail", accepts=("EPERM",),
        calls=(("chmod", (0, 0o4755)), ("fchmod", (0, 0o2755)), ("fchmodat", (0, 0, 0o4755)))),
    Row("PRV-10", Area.PROCESS, "the system-call policy, byte by byte",
        "Of the kernel's 400 calls this app can use those that a web app needs, and no others.", CRITICAL,
        "CIS-Docker:5.22 CIS-Docker:2.17 NIST-800-190:4.4.3", _RESTART, "debuggers and io_uring do not work", _filter,
        clause=Clause.SECCOMP),
    Row("PRV-11", Area.PROCESS, "no 32-bit calls", "The old 32-bit way into the kernel ends the process.", SEVERE,
        "CVE-2026-31431", _RESTART, "32-bit programs do not run", _abi32, clause=Clause.SECCOMP),
    Row("PRV-12", Area.PROCESS, "no sockets through 32-bit calls", "Forbidden sockets cannot be had by the 32-bit way.",
        SERIOUS, "CVE-2026-31431", _RESTART, "32-bit programs do not run", _socketcall, clause=Clause.SECCOMP),
    Row("PRV-13", Area.PROCESS, "no x32 calls", "The x32 way into the kernel ends the process.", SEVERE, "", _RESTART,
        "x32 programs do not run", _x32, clause=Clause.SECCOMP),
    Row("PRV-14", Area.PROCESS, "no bypass by high bits", "A forbidden value with extra bits is refused like the value.",
        SEVERE, "CVE-2019-7303 CVE-2019-10063", _RESTART, _NONE, accepts=("EAFNOSUPPORT", "EPERM"),
        calls=(("socket", (1 << 32 | 40, 1, 0)), ("ioctl", (0, 1 << 32 | 0x5412)))),
    Row("PRV-15", Area.PROCESS, "unknown calls do not exist", "Calls newer than the policy are refused, not passed.",
        SERIOUS, "", _RESTART, "newest kernel features are not seen", _unknown, accepts=("ENOSYS", "EPERM")),
    Row("PRV-16", Area.PROCESS, "cannot weaken address randomisation", "This app cannot switch its own protections off.",
        MODERATE, "", _RESTART, _NONE, accepts=("EPERM",), calls=(("personality", (0x40000,)),)),
    Row("PRV-17", Area.PROCESS, "no ptrace", "No process of this app can trace another.", SERIOUS,
        "ATT&CK:T1055.008", _RESTART, "debuggers do not work", accepts=("EPERM",), calls=calls("ptrace")),
    Row("PRV-18", Area.PROCESS, "no access to other processes' memory", "Processes cannot read or write each other.",
        SERIOUS, "ATT&CK:T1055.009", _RESTART, "debuggers do not work", accepts=("EPERM",),
        calls=calls("process_vm_readv", "process_vm_writev", "pidfd_getfd", "kcmp", "process_madvise")),
    Row("PRV-19", Area.PROCESS, "sees and signals its own processes only",
        "This app cannot see, signal or stop a process of the host or of another app.", SERIOUS,
        "CIS-Docker:5.16 ATT&CK:T1057", _RESTART, _NONE, _processes, accepts=("ESRCH", "own only"),
        clause=Clause.NAMESPACES),
    Row("PRV-20", Area.PROCESS, "cannot kill its init", "This app cannot end the process that collects its children.",
        MINOR, "ATT&CK:T1489", _RESTART, _NONE, accepts=("ignored",)),
    Row("PRV-21", Area.PROCESS, "cannot have signals sent to the host", "No indirect way signals a process of the host.",
        MODERATE, "", _RESTART, _NONE, accepts=("ESRCH",)),
    Row("PRV-22", Area.PROCESS, "cannot outlive its stop", "When this app is stopped, nothing of it goes on.", SERIOUS,
        "", "sandbox gc", _NONE, _unkillable),
    Row("PRV-23", Area.PROCESS, "cannot leave its cgroup", "Every process of this app counts towards its limits.",
        SERIOUS, "CIS-Docker:5.25", _RESTART, _NONE, _daemon),
    Row("PRV-24", Area.PROCESS, "zombies count", "Dead children that nobody collects count towards the limit.", MINOR,
        "CIS-Docker:5.29 ATT&CK:T1499.001", _RESTART, _NONE, _zombies),
    Row("PRV-25", Area.PROCESS, "no real-time priority", "This app cannot push itself before others.", MODERATE,
        "ATT&CK:T1496", _RESTART, _NONE, _priority, accepts=("EPERM", "EACCES"), clause=Clause.RLIMITS),
    Row("PRV-26", Area.PROCESS, "dies first when memory is short", "This app cannot hide from the kernel's memory killer.",
        MODERATE, "", _RESTART, _NONE, _oom, accepts=("EACCES",), clause=Clause.OOM_SCORE),
    Row("PRV-27", Area.PROCESS, "cannot type into terminals", "This app cannot type commands into an operator's shell.",
        SERIOUS, "CVE-2017-5226", _RESTART, _NONE, _terminals, accepts=("EPERM",),
        calls=(("ioctl", (0, 0x5412)), ("ioctl", (0, 1 << 32 | 0x5412)), ("ioctl", (0, 0x541C)), ("ioctl", (0, 0x5423)))),
    Row("PRV-28", Area.PROCESS, "no leaked descriptors", "This app was handed no open file of the host.", CRITICAL,
        "CVE-2024-21626", "upgrade the runtime", _NONE, _descriptors, clause=Clause.DESCRIPTORS),
    Row("PRV-29", Area.PROCESS, "cannot overwrite its launcher", "This app cannot change the program that started it.",
        SERIOUS, "CVE-2019-5736", _RESTART, _NONE, _launcher, accepts=("EACCES", "EROFS")),
    Row("PRV-30", Area.PROCESS, "nothing joins it", "No helper with more rights enters this app while it runs.", MODERATE,
        "CVE-2016-9962", "", _NONE, _joiner),
    Row("PRV-31", Area.PROCESS, "no core dumps through a helper", "A crash of this app starts no program of the host.",
        SERIOUS, "CVE-2025-4598 CVE-2025-5054", "sysctl -w kernel.core_pattern=core",
        "crashes of host programs are no longer collected", _core, clause=Clause.RLIMITS),
    Row("PRV-32", Area.PROCESS, "programs without a file", "Not promised: this app may run code from memory.", MINOR,
        "ATT&CK:T1620", "", "", _memfd),
)  # fmt: skip
