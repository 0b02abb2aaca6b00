"""Namespaces, and the parts of the kernel that this app can reach."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from sandbox.host import observe
from sandbox.policy.clauses import Clause
from sandbox.policy.seccomp import NETLINK
from sandbox.report.facts import Facts
from sandbox.report.model import CRITICAL, MINOR, MODERATE, SERIOUS, SEVERE, Area, Fact, Row
from sandbox.report.rows.common import absent, calls, host, kernel, measured, read_host, twin

_FIX = "restart the dyno; if it comes back, `sandbox doctor`"
_NONE = "none for web apps"
_NS_FLAGS = (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)


def _namespaces(facts: Facts) -> Iterator[Fact]:
    kinds = [kind for kind in observe.NAMESPACES if kind != "user"]
    mine = {kind: observe.namespace(facts.pid, kind) for kind in kinds}
    yield from facts.clause(
        Clause.NAMESPACES,
        lambda: " ".join(f"{kind}:{mine[kind]}" for kind in kinds),
    )
    for other, theirs in facts.others_namespaces():
        same = [kind for kind in kinds if mine[kind] == theirs[kind]]
        yield kernel(f"shared with {other.name}", "none", ", ".join(same) or "none", holds=not same)


def _limits_inside(facts: Facts) -> Iterator[Fact]:
    """Read from within the dyno's user namespace: the limits are the namespace's own."""
    values = facts.user_limits
    for kind in ("user", "mnt", "net", "pid", "uts", "ipc", "cgroup", "time"):
        value = values.get(f"max_{kind}_namespaces")
        if value is not None:
            most = 0 if kind in ("user", "time") else 1
            yield kernel(f"user.max_{kind}_namespaces", most, value, holds=value <= most)


def _no_limits_inside(facts: Facts, fact: Fact) -> str:
    if facts.record.user_namespace:
        return ""
    return f"{facts.record.engine} gives no user namespace that could have such limits; the filter (KRN-01) is the wall"


def _owners(facts: Facts) -> Iterator[Fact]:
    from sandbox.host import inside

    mine = observe.namespace(facts.pid, "user")
    ours = observe.namespace("self", "user")
    for kind, owner in inside.namespace_owners(facts.pid).items():
        names = {mine: "its own user namespace", ours: "the host's user namespace"}
        who = names.get(owner, f"another user namespace, {owner}")
        yield kernel(f"owner of its {kind} namespace", "the host's user namespace", who, holds=owner == ours)


def _owned_by_itself(facts: Facts, fact: Fact) -> str:
    if not facts.record.user_namespace or fact.observed != "its own user namespace":
        return ""
    return (
        f"{facts.record.runtime} makes the user namespace first, so it owns the others; kept by: no capability "
        "(PRV-01), no mount or namespace calls (KRN-01, KRN-07), no further namespaces (KRN-03)"
    )


def _label(facts: Facts) -> Iterator[Fact]:
    modules = read_host("/sys/kernel/security/lsm")
    active = [name for name in ("apparmor", "selinux", "smack") if modules and name in modules.split(",")]
    if not active:
        yield absent("/sys/kernel/security/lsm", modules or "no such file", "this kernel runs no labelling module")
        return
    label = observe.label(facts.pid)
    yield kernel(
        f"{active[0]} label, read back after exec", "a profile in force", label or "none", holds=confines(label)
    )
    if active[0] == "apparmor" and not facts.is_itself:
        yield from facts.clause(Clause.LABEL, lambda: f"all processes: {label}")


def confines(label: str) -> bool:
    """Whether a label is of a profile that is enforced: AppArmor says the mode, SELinux has a type for no confinement."""
    words = label.lower()
    loose = ("unconfined", "(complain)", "spc_t", "kernel_t", "init_t")
    return bool(words) and words != "kernel" and not any(word in words for word in loose)


def _aio(facts: Facts) -> Iterator[Fact]:
    found = measured(facts, "aio")
    if found is not None:
        yield host("fs.aio-nr before and after", "equal", f"{found[0]}, {found[1]}", holds=found[0] == found[1])


# Escapes that were fixed in the kernel: what they need, and the wall that stands before it whatever the version.
_HOLES = (
    ("CVE-2022-0847", (5, 17), "a pipe and a readable file", ""),
    ("CVE-2022-0492", (5, 17), "cgroup v1 and a namespace", "unshare"),
    ("CVE-2024-1086", (6, 8), "nf_tables", "netlink"),
    ("CVE-2025-21756", (6, 14), "vsock sockets", "vsock"),
    ("CVE-2025-38236", (6, 16), "MSG_OOB on Unix sockets", ""),
)


def _holes(facts: Facts) -> Iterator[Fact]:
    """Upstream versions, as of 2026-11; a distribution may have backported a fix without changing the number."""
    doors = {
        "unshare": ("unshare", (0x10000000,)),
        "netlink": ("socket", (NETLINK, 3, 12)),
        "vsock": ("socket", (40, 1, 0)),
    }
    shut = {
        name for name, call in doors.items() if not facts.filter.verdict(*call).startswith(("ALLOW", "LOG", "TRACE"))
    }
    yield from known_holes(os.uname().release, frozenset(shut))


def known_holes(release: str, shut: frozenset[str] = frozenset()) -> Iterator[Fact]:
    """What is known to be open in that release, for a dyno whose filter has ``shut`` these doors."""
    version = tuple(int(part) for part in re.findall(r"\d+", release)[:2])
    for name, fixed, needs, door in _HOLES:
        new = version >= fixed
        text = f"Linux {release}, fixed in {fixed[0]}.{fixed[1]}; needs {needs}"
        if new or door in shut:
            closed = "" if new else ", closed by the filter"
            yield host(name, "fixed, or out of reach", text + closed, holds=True)
        else:
            old = version < (5, 10)  # no distribution keeps these up any more
            why = "only the distribution knows whether it backported the fix"
            yield host(name, "fixed", text, holds=False if old else None, why=why)


def _processor(_: Facts) -> Iterator[Fact]:
    folder = "/sys/devices/system/cpu/vulnerabilities"
    if not os.path.isdir(folder):
        yield absent(folder, "no such folder", "the kernel says nothing about this processor")
        return
    for name in sorted(os.listdir(folder)):
        said = read_host(f"{folder}/{name}") or ""
        if name != "old_microcode":
            known = said.startswith(("Not affected", "Mitigation"))
            holds = "vulnerable" not in said.lower() and (True if known else None)
            yield host(name, "not affected, or mitigated", said[:70], holds=holds, why="the kernel does not know")


def _open_processor(facts: Facts, fact: Fact) -> str:
    """The host's owner decides about microcode and SMT; a container cannot close this."""
    return "the processor's owner decides: microcode and boot options, see `sandbox doctor`"


def _oob(_: Facts) -> Iterator[Fact]:
    yield absent("MSG_OOB in the policy", "allowed", "not promised: telnet-like protocols need it")


def _sysrq(facts: Facts) -> Iterator[Fact]:
    if not os.path.exists("/proc/sysrq-trigger"):
        yield absent("/proc/sysrq-trigger", "no such file", "this kernel has no emergency keys")
        return
    said = facts.answer("KRN-29", "open /proc/sysrq-trigger for writing")
    if said is not None:
        yield twin("open /proc/sysrq-trigger for writing", "EROFS", said, holds=said in ("EROFS", "EACCES"))


def _clone3(facts: Facts) -> Iterator[Fact]:
    said = facts.answer("KRN-02b", "clone3")
    if said is not None:
        yield twin("clone3", "ENOSYS", said, holds=said == "ENOSYS")


def _memfd_secret(facts: Facts) -> Iterator[Fact]:
    said = facts.answer("KRN-26b", "memfd_secret")
    if said is not None:
        yield twin("memfd_secret", "ENOSYS", said, holds=said == "ENOSYS")


def _msr(facts: Facts) -> Iterator[Fact]:
    said = facts.answer("KRN-21b", "/dev/cpu/0/msr")
    if said is not None:
        yield twin("/dev/cpu/0/msr", "ENOENT", said, holds=said == "ENOENT")


def _refused(
    number: int, title: str, claim: str, weight: int, refs: str, names: str, *, impact: str = _NONE, accepts: str = "EPERM"
) -> Row:  # fmt: skip
    """A row for calls that the filter refuses and the prober tries."""
    return Row(
        f"KRN-{number:02}", Area.KERNEL, title, claim, weight, refs, _FIX, impact,
        accepts=tuple(accepts.split()), calls=calls(*names.split()), clause=Clause.SECCOMP,
    )  # fmt: skip


ROWS = (
    Row("KRN-01", Area.KERNEL, "cannot make namespaces", "This app cannot build rooms in which it would be root.",
        CRITICAL, "ATT&CK:T1611 CVE-2022-0185 CVE-2024-1086", _FIX, "containers inside the app do not work",
        accepts=("EPERM",), calls=tuple(("unshare", (flag,)) for flag in _NS_FLAGS), clause=Clause.SECCOMP),
    Row("KRN-02", Area.KERNEL, "cannot clone into namespaces", "Nor by the other call that makes them.", CRITICAL, "",
        _FIX, "containers inside the app do not work", _clone3, accepts=("EPERM",),
        calls=(*(("clone", (flag | 17,)) for flag in _NS_FLAGS), ("clone3", ())), clause=Clause.SECCOMP),
    Row("KRN-03", Area.KERNEL, "no namespaces even without the filter",
        "Were the call filter to fail, the kernel would still give this app no namespace.", SEVERE, "NIST-800-190:4.4.3",
        "use --engine oci", _NONE, _limits_inside, lacks=_no_limits_inside),
    Row("KRN-04", Area.KERNEL, "the host owns its namespaces",
        "Root inside this app would have no say over its own network and mounts.", MODERATE, "", "", _NONE, _owners,
        lacks=_owned_by_itself),
    _refused(5, "cannot enter namespaces", "This app cannot move into the host's or another app's rooms.", SERIOUS,
             "ATT&CK:T1611", "setns"),
    Row("KRN-06", Area.KERNEL, "shares no namespace", "Processes, files, network and names of this app are its own.",
        CRITICAL, "CIS-Docker:5.10 CIS-Docker:5.16 CIS-Docker:5.17 CIS-Docker:5.21", _FIX, _NONE, _namespaces,
        clause=Clause.NAMESPACES),
    _refused(7, "cannot mount", "This app cannot attach, detach or rearrange file systems.", CRITICAL,
             "CIS-Docker:5.5 ATT&CK:T1611",
             "mount umount2 pivot_root fsopen fsconfig fsmount fspick open_tree move_mount mount_setattr"),
    _refused(8, "cannot change its root", "This app cannot move the top of its file system.", MODERATE, "", "chroot"),
    _refused(9, "no io_uring", "A way to work past system-call filters is closed.", SERIOUS, "CVE-2023-2598",
             "io_uring_setup io_uring_enter io_uring_register", accepts="ENOSYS EPERM",
             impact="programs fall back to epoll"),
    _refused(10, "no userfaultfd", "A tool that makes kernel races easy to win is closed.", MODERATE, "", "userfaultfd"),
    _refused(11, "no bpf", "This app cannot load programs into the kernel.", SERIOUS, "ATT&CK:T1014", "bpf"),
    Row("KRN-12", Area.KERNEL, "no socket filters", "Nor small ones, by way of a socket.", MODERATE, "", _FIX,
        "packet sniffers do not work", accepts=("EPERM",),
        calls=tuple(("setsockopt", (0, 1, option)) for option in (26, 50, 51, 52)), clause=Clause.SECCOMP),
    _refused(13, "no performance counters", "This app cannot watch others through the processor.", MODERATE, "",
             "perf_event_open", impact="profilers that use perf do not work"),
    _refused(14, "no key rings", "Keys kept in the kernel are out of reach.", SERIOUS, "", "add_key request_key keyctl"),
    _refused(15, "cannot load kernel modules", "This app cannot add code to the kernel.", SERIOUS, "ATT&CK:T1547.006",
             "init_module finit_module delete_module"),
    _refused(16, "cannot replace the kernel", "This app cannot start another kernel.", SERIOUS, "",
             "kexec_load kexec_file_load"),
    _refused(17, "cannot reboot", "This app cannot restart the host.", SERIOUS, "ATT&CK:T1529", "reboot"),
    _refused(18, "cannot set the clock", "This app cannot change the host's time.", MODERATE, "",
             "adjtimex settimeofday clock_settime clock_adjtime"),
    _refused(19, "cannot rename the host", "This app cannot change names of the machine.", MINOR, "",
             "sethostname setdomainname"),
    _refused(20, "no swap, quota or log control", "Administration of the host is out of reach.", MODERATE, "",
             "swapon swapoff quotactl quotactl_fd acct vhangup syslog"),
    Row("KRN-21", Area.KERNEL, "no hardware access", "This app cannot talk to devices past the kernel.", SERIOUS, "",
        _FIX, _NONE, _msr, accepts=("EPERM",), calls=calls("iopl", "ioperm"), clause=Clause.SECCOMP),
    _refused(22, "no descriptor tables", "A legacy part of the processor's interface is closed.", MINOR,
             "CVE-2015-5157", "modify_ldt", impact="16-bit Windows programs do not run"),
    _refused(23, "no memory placement", "This app cannot steer memory between processors.", MINOR, "",
             "mbind set_mempolicy get_mempolicy migrate_pages move_pages"),
    _refused(24, "no file handles", "Files cannot be opened past the paths that this app may see.", SERIOUS,
             "ATT&CK:T1611", "name_to_handle_at open_by_handle_at"),
    _refused(25, "no file system watch over others", "This app cannot watch other people's files.", MODERATE, "",
             "fanotify_init fanotify_mark"),
    Row("KRN-26", Area.KERNEL, "no exploit helpers", "Calls that mostly exploits use are closed.", MODERATE, "", _FIX,
        _NONE, _memfd_secret, accepts=("EPERM",), calls=calls("vmsplice", "remap_file_pages", "memfd_secret"),
        clause=Clause.SECCOMP),
    Row("KRN-27", Area.KERNEL, "cannot use up the host's asynchronous I/O", "A host-wide pool cannot be emptied.",
        MODERATE, "", _FIX, "databases that insist on kernel AIO do not run", _aio, accepts=("EPERM",),
        calls=calls("io_setup"), clause=Clause.SECCOMP),
    Row("KRN-28", Area.KERNEL, "cannot change kernel settings", "Every switch of the kernel is read-only.", SERIOUS,
        "ATT&CK:T1611", _FIX, _NONE, accepts=("none",), clause=Clause.MOUNTS),
    Row("KRN-29", Area.KERNEL, "cannot use the emergency keys", "This app cannot trigger reboots or dumps by file.",
        SERIOUS, "CVE-2025-52881", _FIX, _NONE, _sysrq, clause=Clause.MOUNTS),
    Row("KRN-30", Area.KERNEL, "a security label in force", "A second, independent wall stands around files.", MODERATE,
        "CIS-Docker:5.2 CIS-Docker:5.3 CVE-2025-52881", "apt-get install apparmor, then restart the dyno", _NONE, _label, clause=Clause.LABEL),
    Row("KRN-31", Area.KERNEL, "known kernel holes", "Holes that others escaped through are fixed or out of reach.",
        SERIOUS, "NIST-800-190:3.5.3 NIST-800-190:4.5.3", "upgrade the kernel", "a reboot", _holes),
    Row("KRN-32", Area.KERNEL, "processor holes are mitigated", "The processor's known leaks are closed where they can be.",
        MODERATE, "NIST-800-190:4.5.3", "update microcode; see `sandbox doctor`", "some speed", _processor,
        lacks=_open_processor),
    Row("KRN-33", Area.KERNEL, "out-of-band data on local sockets", "Not promised: a rarely used feature stays open.",
        MINOR, "CVE-2025-38236", "", "", _oob),
)  # fmt: skip
