"""Files, mounts and devices."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from sandbox.errors import HostError
from sandbox.host import observe
from sandbox.policy import mounts as plan
from sandbox.policy.clauses import Clause
from sandbox.report.facts import Facts
from sandbox.report.model import CRITICAL, MINOR, MODERATE, SERIOUS, Area, Fact, Row
from sandbox.report.rows.common import calls, counted, host, kernel, measured, rlimit, twin
from sandbox.units import format_bytes

_FIX = "restart the dyno; if it comes back, `sandbox doctor`"
_NONE = "none for web apps"
# What every process of a dyno runs through; hashed from the page cache, where known exploits wrote.
_CRITICAL_FILES = ("ld-linux-x86-64.so.2", "libc.so.6", "dash", "bash", "tini")


def _mounts(facts: Facts) -> Iterator[Fact]:
    yield from facts.clause(Clause.MOUNTS, lambda: f"{len(facts.mounts)} mounts, each as planned, each nosuid")
    # By the kernel's numbers: an overlay is like any other by its type, and a device node's place takes any file.
    now, start = [observe.identity(line) for line in facts.mounts], facts.record.mounts
    changed = [f"new: {item}" for item in now if item not in start] + [
        f"gone: {item}" for item in start if item not in now
    ]
    yield kernel(
        "mounts since its start", "the same", "; ".join(changed[:3]) or f"the same {len(now)}", holds=not changed
    )


def _propagation(facts: Facts) -> Iterator[Fact]:
    tied = [f"{line.target} {line.propagation}" for line in facts.mounts if line.propagation]
    yield kernel("mounts tied to the host's", "none", "; ".join(tied[:3]) or "none", holds=not tied)


def _nodes(facts: Facts) -> Iterator[Fact]:
    """Through the dyno's own root: /dev is a tmpfs of ours, on which the app can make nothing."""
    base, own = f"/proc/{facts.pid}/root/dev", {}
    for folder, folders, names in os.walk(base):
        if folder == base:
            folders[:] = [name for name in folders if name not in ("pts", "shm", "mqueue")]
        for name in (*folders, *names):
            own[f"{folder}/{name}".removeprefix(f"{base}/")] = os.lstat(f"{folder}/{name}")
    wanted = {name: (major, minor) for name, major, minor in plan.DEVICES}
    if facts.spec.tty:
        wanted["console"] = (136, 0)
    for name, status in sorted(own.items()):
        if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
            number = (os.major(status.st_rdev), os.minor(status.st_rdev))
            good = stat.S_ISCHR(status.st_mode) and (wanted.get(name) == number or name == "console")
            if not good:
                yield kernel(f"/dev/{name}", "no such device", f"{number[0]}:{number[1]}", holds=False)
    nodes = [name for name, status in own.items() if stat.S_ISCHR(status.st_mode)]
    yield kernel("device nodes", "the harmless six", " ".join(sorted(nodes)), holds=set(nodes) <= {*wanted, "console"})


def _devices(facts: Facts) -> Iterator[Fact]:
    yield from facts.clause(Clause.DEVICES, lambda: f"{facts.subject.limits.devices}"[:70])


def _masks(facts: Facts) -> Iterator[Fact]:
    """By identity: an empty file is no mask, the verified null device and an empty read-only folder are."""
    checked, wrong = 0, []
    top = {line.target: line for line in facts.mounts}
    for path in plan.MASKED:
        if not os.path.exists(path):
            continue
        checked += 1
        status = os.stat(f"/proc/{facts.pid}/root{path}")
        line = top.get(path)
        if line is None:
            wrong.append(f"{path}: not mounted over")
        elif stat.S_ISDIR(status.st_mode):
            if line.fstype != "tmpfs" or os.listdir(f"/proc/{facts.pid}/root{path}"):
                wrong.append(f"{path}: {line.fstype}, not empty")
        elif not stat.S_ISCHR(status.st_mode) or status.st_rdev != os.makedev(1, 3):
            wrong.append(f"{path}: not the null device")
    yield kernel(
        "masked files and folders",
        "null device 1:3, or an empty folder",
        "; ".join(wrong[:3]) or f"all {checked}",
        holds=not wrong,
    )


def _read_only(facts: Facts) -> Iterator[Fact]:
    top = {line.target: line for line in facts.mounts}
    for path in plan.READ_ONLY:
        if os.path.exists(path):
            flags = top[path].flags if path in top else frozenset()
            yield kernel(path, "read-only", "read-only" if "ro" in flags else "writable", holds="ro" in flags)


def _host_paths(facts: Facts) -> Iterator[Fact]:
    """The overlay's options and the roots of binds: whatever of the host's own folders they name."""
    base = (facts.config.state_dir, facts.config.run_dir, "/var/lib/docker", "/var/lib/containerd")
    told = [
        line.target
        for line in facts.mounts
        if any(part in f"{line.options} {line.source} {line.root}" for part in base) or "=/" in line.options
    ]
    yield kernel("mounts that name folders of the host", "none", ", ".join(told[:3]) or "none", holds=not told)


def _docker_paths(facts: Facts, fact: Fact) -> str:
    """Of the root mount, and of Docker's own folders; any other is news."""
    own = fact.observed == "/" or all(word.startswith("/var/lib/docker") for word in fact.observed.split())
    if facts.record.engine != "docker" or not own:
        return ""
    return "Docker's own overlay names its folders in the mount table; they tell an attacker where, and open nothing"


def _fill(facts: Facts) -> Iterator[Fact]:
    policy = facts.spec.policy
    yield from facts.clause(Clause.DISK, lambda: f"{format_bytes(policy.disk_bytes)} on an image of its own")
    found = measured(facts, "disk")
    if found is not None:
        said, written = found["said"], int(found["written"])
        # The file system keeps a few per cent for its own tables.
        good = said in ("ENOSPC", "EFBIG", "EDQUOT") and 0.85 * policy.disk_bytes <= written <= policy.disk_bytes
        yield twin("written until refused", f"at most {policy.disk_bytes}", f"{written} bytes, then {said}", holds=good)


def _fill_memory(facts: Facts) -> Iterator[Fact]:
    found = measured(facts, "shm")
    if found is not None:
        most = facts.spec.policy.shm_bytes
        good = found["said"] == "ENOSPC" and int(found["written"]) <= most
        yield twin(
            "/dev/shm until refused", f"at most {most}", f"{found['written']} bytes, then {found['said']}", holds=good
        )


def _inodes(facts: Facts) -> Iterator[Fact]:
    most = os.statvfs(facts.spec.paths.disk).f_files
    limit = facts.spec.policy.disk_inodes * 1.1 + 1024
    yield kernel("inodes of its disk", f"about {facts.spec.policy.disk_inodes}", most, holds=most <= limit)
    said = facts.answer("FS-18", "empty files")
    if said is not None:
        made = int(facts.answer("FS-18", "files") or 0)
        yield twin(
            "files until refused",
            f"at most {most}",
            f"{made} files, then {said}",
            holds=said == "ENOSPC" and made <= most,
        )


def _fsize(facts: Facts) -> Iterator[Fact]:
    yield from rlimit(facts, "FSIZE")


def _ephemeral(facts: Facts) -> Iterator[Fact]:
    said = facts.answer("FS-20", "the marker of an earlier twin")
    if said is not None:
        own = facts.answer("FS-20", "a marker of its own")
        yield twin("a file of an earlier twin", "gone", said, holds=said == "gone")
        yield twin(
            "a file of its own",
            "ok",
            str(own),
            holds=True if own == "ok" else None,
            why="nothing can be written at all",
        )


class _Built(NamedTuple):
    """What the stack's manifest says, as far as it is asked: digests, setuid files, links."""

    files: int
    digests: dict[str, str]
    setuid: tuple[str, ...]
    links: frozenset[str]


@cache
def _built(manifest: str) -> _Built:
    """The manifest's name is the digest of its image: what was read of it once stays true."""
    try:
        with open(manifest, encoding="utf-8") as file:
            entries: dict[str, Any] = json.load(file)
    except FileNotFoundError as error:
        raise HostError("the stack image's manifest is gone.", hint="sandbox stack build") from error
    return _Built(
        len(entries),
        {
            path: entry["sha256"]
            for path, entry in entries.items()
            if path.startswith("usr/") and path.rpartition("/")[2] in _CRITICAL_FILES and "sha256" in entry
        },
        tuple(path for path, entry in entries.items() if int(entry["mode"]) & 0o6000 and "link" not in entry),
        frozenset(path for path in _POINTS if "link" in entries.get(path, {})),
    )


_POINTS = ("dev", "proc", "sys", "app", "tmp", "run/gate", "etc/heroku")


def _page_cache(facts: Facts) -> Iterator[Fact]:
    """As the dyno's processes would read them, from the page cache, against what was built."""
    for path, digest in sorted(_built(facts.record.stack_manifest).digests.items()):
        try:
            with open(f"/proc/{facts.pid}/root/{path}", "rb") as file:
                actual = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            actual = "missing"
        yield kernel(f"/{path}", f"sha256 {digest[:12]}", f"sha256 {actual[:12]}", holds=actual == digest)


def _setuid_files(facts: Facts) -> Iterator[Fact]:
    built = _built(facts.record.stack_manifest)
    yield host(
        f"setuid and setgid among {built.files} files of the stack",
        "none",
        ", ".join(built.setuid[:3]) or "none",
        holds=not built.setuid,
    )
    found = [
        entry.name
        for entry in os.scandir(f"/proc/{facts.pid}/root/usr/bin")
        if not entry.is_symlink() and entry.stat(follow_symlinks=False).st_mode & 0o6000
    ]
    yield kernel("setuid and setgid programs in /usr/bin", "none", ", ".join(found[:3]) or "none", holds=not found)


def _places(facts: Facts) -> Iterator[Fact]:
    """A link where a mount goes would lead the mount out of the dyno's tree."""
    links = _built(facts.record.stack_manifest).links
    yield host("links among the mount points of the stack", "none", ", ".join(links) or "none", holds=not links)
    for target in ("/dev", "/proc", "/sys", "/app"):
        status = os.lstat(f"/proc/{facts.pid}/root{target}")
        if not stat.S_ISDIR(status.st_mode):
            yield kernel(target, "a folder", "something else", holds=False)
    own = {line.target for line in facts.mounts}
    wanted = {mount.target for mount in plan.PLAN}
    missing = sorted(wanted - own)
    yield kernel("planned mounts that are in their place", len(wanted), len(wanted) - len(missing), holds=not missing)


def _slug(facts: Facts) -> Iterator[Fact]:
    """Whatever is in the slug, it lies below flags that take its teeth."""
    for line in facts.mounts:
        if line.target == "/app":
            lost = {"nosuid", "nodev"} - line.flags
            yield kernel(
                "/app", "nosuid, nodev", "without " + ", ".join(lost) if lost else "nosuid, nodev", holds=not lost
            )
            return
    yield kernel("/app", "a mount of its own", "none", holds=False)


def _inotify(facts: Facts) -> Iterator[Fact]:
    if facts.record.user_namespace:
        value = facts.user_limits.get("max_inotify_instances", 1 << 30)
        yield kernel("user.max_inotify_instances, inside", "at most 128", value, holds=value <= 128)
    said = facts.answer("FS-24", "inotify instances")
    if said is not None:
        word, number = counted(said)
        yield twin("inotify instances", "EMFILE at 128 or fewer", said, holds=word == "EMFILE" and number <= 128)


def _locks(facts: Facts) -> Iterator[Fact]:
    found = measured(facts, "lock")
    if found is not None:
        yield host("the host locks a file that the twin holds locked", "at once", found, holds=found == "at once")
        said = facts.answer("FS-25", "a lease on a file of the stack")
        yield twin("a lease on a file of the stack", "EACCES", str(said), holds=said in ("EACCES", "EAGAIN"))


def _dev_listing(facts: Facts) -> Iterator[Fact]:
    said = facts.answer("FS-05", "/dev")
    if said is None:
        return
    good = {f"{name} {major}:{minor}" for name, major, minor in plan.DEVICES} | {"console 136:0"}
    words = said.split()
    nodes = [f"{words[i]} {words[i + 1]}" for i in range(len(words) - 1) if ":" in words[i + 1]]
    extra = sorted(set(nodes) - good)
    yield twin(
        "devices that it lists", "the harmless six", ", ".join(extra) or f"{len(nodes)} harmless ones", holds=not extra
    )


def _sync(facts: Facts) -> Iterator[Fact]:
    """Refused with error 0: the call does nothing, and says that it went well."""
    said = facts.filter.verdict("sync", ())
    yield kernel("filter: sync()", "ERRNO(0)", said, holds=said == "ERRNO(0)")


def _both_devices(facts: Facts) -> Iterator[Fact]:
    yield from _nodes(facts)
    yield from _dev_listing(facts)


def _disk_row(facts: Facts) -> Iterator[Fact]:
    yield from _fill(facts)
    yield from _fill_memory(facts)


ROWS = (
    Row("FS-01", Area.FILES, "cannot write the base system", "The system that this app runs on cannot be changed by it.",
        SERIOUS, "CIS-Docker:5.13", _FIX, "only /app, /tmp and /var/tmp can be written", accepts=("EROFS", "EACCES"),
        clause=Clause.MOUNTS),
    Row("FS-02", Area.FILES, "the planned mounts, and no other", "Nothing of the host is mounted into this app.", CRITICAL,
        "CIS-Docker:5.6 ATT&CK:T1611", _FIX, _NONE, _mounts, clause=Clause.MOUNTS),
    Row("FS-03", Area.FILES, "mounts are tied to nothing", "What the host mounts later does not appear in this app.",
        SERIOUS, "CIS-Docker:5.20", _FIX, _NONE, _propagation, clause=Clause.MOUNTS),
    Row("FS-04", Area.FILES, "cannot make device files", "This app cannot make a way to the host's disks.", SERIOUS,
        "CIS-Docker:5.18 ATT&CK:T1611", _FIX, _NONE, accepts=("EPERM",),
        calls=(("mknod", (0, 0o020600)), ("mknod", (0, 0o060600)), ("mknodat", (0, 0, 0o020600)))),
    Row("FS-05", Area.FILES, "harmless devices only", "Its devices give zeros, randomness and nothing else.", SERIOUS,
        "CIS-Docker:5.18", _FIX, _NONE, _both_devices),
    Row("FS-06", Area.FILES, "a device filter in force", "Even a device file would not open.", SERIOUS, "CIS-Docker:5.18",
        _FIX, _NONE, _devices, clause=Clause.DEVICES),
    Row("FS-07", Area.FILES, "no dangerous devices", "Memory, disks and virtual machines of the host are not there.",
        SERIOUS, "ATT&CK:T1611", _FIX, _NONE, accepts=("ENOENT", "ENOTDIR")),
    Row("FS-08", Area.FILES, "masks that are what they seem", "Files that tell about the host read as empty.", SERIOUS,
        "CVE-2025-31133", "upgrade the runtime", _NONE, _masks, clause=Clause.MOUNTS),
    Row("FS-09", Area.FILES, "cannot write to /proc", "Kernel controls in the file system are read-only.", SERIOUS,
        "CIS-Docker:5.5 CVE-2025-52881", _FIX, _NONE, _read_only, accepts=("EROFS", "EACCES", "ENOENT"),
        clause=Clause.MOUNTS),
    Row("FS-10", Area.FILES, "no kernel addresses", "The kernel's layout, which exploits need, is hidden.", MODERATE,
        "ATT&CK:T1082", _FIX, _NONE, accepts=("empty", "zeros", "EACCES", "EPERM", "ENOENT"), clause=Clause.MOUNTS),
    Row("FS-11", Area.FILES, "no view of the host's devices", "This app cannot watch the host's disks, interrupts, locks and hardware (totals: IDN-04).",
        MODERATE, "ATT&CK:T1082 CVE-2020-8694", _FIX, _NONE,
        accepts=("empty", "EACCES", "EPERM", "ENOENT", "ENOTDIR", "EISDIR"), clause=Clause.MOUNTS),
    Row("FS-12", Area.FILES, "no host paths in its mount table", "Where its files lie on the host is not told.", MINOR, "",
        "use --engine oci", _NONE, _host_paths, accepts=("none",), lacks=_docker_paths),
    Row("FS-13", Area.FILES, "other apps' files are out of reach", "This app cannot open a file of another app.", CRITICAL,
        "ATT&CK:T1083", _FIX, _NONE, accepts=("ENOENT", "EACCES", "ENOTDIR")),
    Row("FS-14", Area.FILES, "no control sockets", "No door to Docker, systemd or the supervisor is in reach.", CRITICAL,
        "CIS-Docker:5.32 ATT&CK:T1552.007", _FIX, _NONE, accepts=("none", "ENOENT", "ENOTDIR")),
    Row("FS-15", Area.FILES, "mounts are where they were meant", "No link led a mount to another place.", SERIOUS,
        "CVE-2019-19921 CVE-2021-30465 CVE-2026-41579", "sandbox stack build --force", _NONE, _places),
    Row("FS-16", Area.FILES, "a hostile slug has no teeth", "Whatever an app's archive holds, it runs without rights.",
        SERIOUS, "CVE-2025-47290", _FIX, _NONE, _slug),
    Row("FS-17", Area.FILES, "its disk is bounded", "This app cannot fill the host's disk.", SERIOUS, "ATT&CK:T1499", _FIX,
        "writes fail at the limit", _disk_row, clause=Clause.DISK),
    Row("FS-18", Area.FILES, "its files are bounded in number", "Nor use up the host's files.", SERIOUS, "ATT&CK:T1499",
        _FIX, "no new files at the limit", _inodes, clause=Clause.DISK),
    Row("FS-19", Area.FILES, "cannot reserve what it may not use", "Large files fail at once.", MODERATE, "", _FIX, _NONE,
        _fsize, accepts=("EFBIG", "ENOSPC", "EINVAL"), clause=Clause.RLIMITS),
    Row("FS-20", Area.FILES, "nothing survives a restart", "Each start begins with the app as it was built.", MODERATE, "",
        _FIX, "keep data in a database", _ephemeral),
    Row("FS-21", Area.FILES, "the shared system files are unaltered",
        "The loader, C library and shells in memory are those that were built.", CRITICAL,
        "CVE-2026-31431 CVE-2026-43284 CVE-2026-43500 CVE-2026-46300", "reboot the host; find out who wrote to the page cache",
        "a reboot", _page_cache),
    Row("FS-22", Area.FILES, "no setuid programs", "No program in reach runs with another's rights.", SERIOUS,
        "CIS-Docker:4.8", "sandbox stack build --force", _NONE, _setuid_files),
    Row("FS-23", Area.FILES, "cannot stall the host's disks", "One app's sync does not wait for everybody's data.", MINOR,
        "", _FIX, "sync does nothing; syncfs and fsync work", _sync, accepts=("ok",)),
    Row("FS-24", Area.FILES, "its own budget of file watches", "This app cannot use up what others need to watch files.",
        MODERATE, "", _FIX, _NONE, _inotify),
    Row("FS-25", Area.FILES, "its locks bind nobody else", "A lock on a shared file does not hold up others.", MODERATE, "",
        _FIX, _NONE, _locks),
    Row("FS-26", Area.FILES, "cannot mount images", "A crafted disk image cannot attack the kernel.", SERIOUS,
        "NIST-800-190:4.5.5", _FIX, _NONE, accepts=("EPERM",), calls=calls("mount"), clause=Clause.SECCOMP),
    Row("FS-27", Area.FILES, "one root for all its processes", "No process of it sees another file system.", SERIOUS,
        "CVE-2024-21626", _FIX, _NONE, accepts=("own root",)),
    Row("FS-28", Area.FILES, "no access to its limits", "This app cannot change the limits that hold it.", CRITICAL,
        "CVE-2022-0492 CIS-Docker:5.25", _FIX, _NONE, accepts=("EROFS", "ENOENT", "EACCES", "none")),
)  # fmt: skip
