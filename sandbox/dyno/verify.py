"""Reads the whole wall back from the kernel and compares it with the policy, clause by clause.

Runs while the gate is shut: every process of the container is then ours, and none has run an instruction of the app.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple, TypeVar

from sandbox.config import Config
from sandbox.errors import HostError
from sandbox.firewall import admit
from sandbox.firewall.layout import Place
from sandbox.host import apparmor, observe
from sandbox.host.cgroup import Cgroup, Limits, shares_to_weight
from sandbox.host.observe import MountLine
from sandbox.policy import mounts
from sandbox.policy.clauses import Clause
from sandbox.policy.mounts import Mount, Source
from sandbox.policy.policy import CPU_PERIOD_US
from sandbox.policy.spec import UIDS_PER_DYNO, ContainerSpec

# runc and Docker allow mknod of anything (harmless: no CAP_MKNOD, and every mount is nodev) and the tun device,
# whose node is in no dyno.
_DEVICES = frozenset(
    ("b *:* m", "c *:* m", "c 5:0 rwm", "c 5:1 rwm", "c 5:2 rwm", "c 136:* rwm", "c 10:200 rwm")
    + tuple(f"c {major}:{minor} rwm" for _, major, minor in mounts.DEVICES)
)


class Difference(NamedTuple):
    """A clause that the kernel does not enforce as the policy says."""

    clause: Clause
    promised: str
    observed: str


@dataclass(frozen=True)
class Subject:
    """The container under examination. What several clauses look at is read once."""

    spec: ContainerSpec
    user_namespace: bool
    pids: tuple[int, ...]
    cgroup: Cgroup
    config: Config
    place: Place | None

    @property
    def init(self) -> int:
        return self.pids[0]

    @cached_property
    def threads(self) -> list[observe.Thread]:
        """Every thread of every process: credentials and filters are per thread."""
        return [thread for _, found in living(self, observe.threads) for thread in found]

    @cached_property
    def mounts(self) -> list[MountLine]:
        return observe.mounts(self.init)

    @cached_property
    def limits(self) -> Limits:
        return self.cgroup.limits()

    @cached_property
    def rlimits(self) -> list[dict[str, tuple[int, int]]]:
        """The resource limits of every process."""
        return [found for _, found in living(self, observe.rlimits)]


def differences(subject: Subject) -> list[Difference]:
    """Every difference between policy and kernel, waived clauses excepted; empty when the wall stands.

    Evidence that cannot be read is a difference of its clause, never a pass.
    """
    found: list[Difference] = []
    for clause, check in CHECKS.items():
        if not subject.spec.policy.holds(clause):
            continue
        try:
            found += [Difference(clause, promised, observed) for promised, observed in check(subject)]
        except (HostError, OSError, ValueError, KeyError, IndexError) as error:
            found.append(Difference(clause, clause.promise, f"unreadable: {error}"))
    return found


Check = Callable[[Subject], Iterator[tuple[str, str]]]


def _uid(subject: Subject) -> Iterator[tuple[str, str]]:
    spec = subject.spec
    own = (spec.host_uid,) * 4
    for thread in subject.threads:
        if thread.uids != own or thread.gids != own:
            yield f"ids {spec.host_uid} only", f"thread {thread.tid}: uids {thread.uids}, gids {thread.gids}"
        if not set(thread.groups) <= {spec.host_uid}:
            yield "no supplementary group", f"thread {thread.tid}: groups {thread.groups}"
    if not subject.user_namespace:
        return
    expected = [(0, spec.uid_base, UIDS_PER_DYNO)]
    for _, maps in living(subject, lambda pid: {kind: observe.id_map(pid, kind) for kind in ("uid", "gid")}):
        for kind, rows in maps.items():
            if rows != expected:
                yield f"{kind} map {expected}", f"{rows}"
    for _, inode in living(subject, lambda pid: observe.namespace(pid, "user")):
        if inode == observe.namespace("self", "user"):
            yield "a user namespace of its own", "the host's"


T = TypeVar("T")


def living(subject: Subject, read: Callable[[int], T]) -> Iterator[tuple[int, T]]:
    """What ``read`` says of every process; one that ends meanwhile is left out, unless it is init.

    Behind the gate none ends. In a live dyno they come and go; what cannot be read of one that lives is an error.
    """
    for pid in subject.pids:
        while True:
            thread = observe.living_thread(pid)
            if thread is None:
                if pid == subject.init:
                    raise HostError("its init is gone.")
                break
            try:
                value = read(thread)
            except (HostError, OSError, KeyError, ValueError):
                if pid == subject.init or observe.thread_lives(thread):
                    raise
                continue  # that thread ended; the process may live on in others
            yield pid, value
            break


def _capabilities(subject: Subject) -> Iterator[tuple[str, str]]:
    for thread in subject.threads:
        held = {name: f"{value:#x}" for name, value in thread.capabilities.items() if value}
        if held:
            yield "no capability", f"thread {thread.tid}: {held}"


def _no_new_privileges(subject: Subject) -> Iterator[tuple[str, str]]:
    for thread in subject.threads:
        if not thread.no_new_privileges:
            yield "no_new_privs is set", f"thread {thread.tid}: not set"


def _seccomp(subject: Subject) -> Iterator[tuple[str, str]]:
    for thread in subject.threads:
        if thread.seccomp_mode != 2 or thread.seccomp_filters == 0:
            yield (
                "a system-call filter",
                f"thread {thread.tid}: mode {thread.seccomp_mode}, {thread.seccomp_filters} filters",
            )


def _namespaces(subject: Subject) -> Iterator[tuple[str, str]]:
    for kind in observe.NAMESPACES:
        if kind == "user":
            continue
        host = observe.namespace("self", kind)
        inodes = {inode for _, inode in living(subject, partial(observe.namespace, kind=kind))}
        if host in inodes:
            yield f"its own {kind} namespace", f"the supervisor's ({host})"
        elif len(inodes) != 1:
            yield f"one {kind} namespace", f"{len(inodes)} of them"


def _network(subject: Subject) -> Iterator[tuple[str, str]]:
    if subject.place is None:
        yield "a place in the network", "none was taken"
    else:
        yield from admit.differences(subject.config, subject.place, subject.init)


def _mounts(subject: Subject) -> Iterator[tuple[str, str]]:
    by_target: dict[str, list[MountLine]] = {}
    for line in subject.mounts:
        by_target.setdefault(line.target, []).append(line)
        if line.propagation:
            yield f"{line.target} is private", line.propagation
    plan = {mount.target: mount for mount in mounts.PLAN}
    allowed = {*plan, *mounts.MASKED, *mounts.READ_ONLY, *(f"/dev/{name}" for name, _, _ in mounts.DEVICES)}
    if subject.spec.tty:
        allowed.add("/dev/console")
    for target in sorted(set(by_target) - allowed):
        yield "no mount but the planned ones", f"{target} ({by_target[target][-1].fstype})"
    for target, mount in plan.items():
        yield from _planned(mount, by_target.get(target, []), subject.spec)
    yield from _masks(by_target)


def _planned(mount: Mount, lines: list[MountLine], spec: ContainerSpec) -> Iterator[tuple[str, str]]:
    if len(lines) != 1:
        yield f"one mount at {mount.target}", f"{len(lines)}"
        return
    line = lines[0]
    wanted = {"nosuid"}
    if mount.source not in (Source.DEV, Source.DEVPTS):  # they hold the dyno's devices
        wanted.add("nodev")
    if not mount.exec:
        wanted.add("noexec")
    wanted.add("ro" if mount.read_only else "rw")
    missing = wanted - line.flags
    if missing:
        yield f"{mount.target} with {', '.join(sorted(wanted))}", f"without {', '.join(sorted(missing))}"
    if mount.source in (Source.DISK, Source.FIXED):
        status = os.stat(spec.paths.disk)
        device = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
        root = f"/{mount.path}" if mount.source is Source.DISK else f"/fixed/{mount.path}"
        if (line.device, line.root) != (device, root):
            yield f"{mount.target} from the dyno's own disk", f"device {line.device}, {line.root}"
    expected = {
        Source.PROC: "proc",
        Source.DEV: "tmpfs",
        Source.DEVPTS: "devpts",
        Source.SHM: "tmpfs",
        Source.APP: "overlay",
    }
    fstype = expected.get(mount.source)
    if fstype is not None and line.fstype != fstype:
        yield f"{mount.target} of type {fstype}", line.fstype
    if mount.source is Source.DEVPTS and f"max={mounts.MAX_TERMINALS}" not in line.options.split(","):
        yield f"at most {mounts.MAX_TERMINALS} terminals", line.options
    if mount.source is Source.SHM:
        bounds = {f"nr_inodes={spec.policy.shm_inodes}", f"size={spec.policy.shm_bytes >> 10}k"}
        if not bounds <= set(line.options.split(",")):
            yield f"{mount.target} with {', '.join(sorted(bounds))}", line.options


def _masks(by_target: dict[str, list[MountLine]]) -> Iterator[tuple[str, str]]:
    for path in mounts.MASKED:
        if not os.path.exists(path):
            continue  # this kernel has no such file, so the dyno has none either
        line = by_target.get(path, [None])[-1]
        if line is None:
            yield f"{path} is masked", "not mounted over"
        elif os.path.isdir(path):
            if line.fstype != "tmpfs" or "ro" not in line.flags | set(line.options.split(",")):
                yield f"{path} is an empty read-only folder", f"{line.fstype}"
        elif line.root != "/null":
            yield f"{path} is the null device", f"{line.fstype} {line.root}"
    for path in mounts.READ_ONLY:
        if os.path.exists(path) and not any("ro" in line.flags for line in by_target.get(path, [])[-1:]):
            yield f"{path} is read-only", "writable"


def _devices(subject: Subject) -> Iterator[tuple[str, str]]:
    devices = subject.limits.devices
    if devices is None:
        yield "a device filter", "none that can be read"
    elif subject.cgroup.is_v2:
        if devices == ("bpf 0",):
            yield "a device filter", "no BPF program is attached"
    else:
        for extra in sorted(set(devices) - _DEVICES):
            yield "harmless devices only", extra


def _disk(subject: Subject) -> Iterator[tuple[str, str]]:
    policy = subject.spec.policy
    status = os.statvfs(subject.spec.paths.disk)
    if os.stat(subject.spec.paths.disk).st_dev == os.stat(os.path.dirname(subject.spec.paths.disk)).st_dev:
        yield "a disk image of its own", "a folder of the host's file system"
    if status.f_blocks * status.f_frsize > policy.disk_bytes:
        yield f"at most {policy.disk_bytes} bytes", f"{status.f_blocks * status.f_frsize}"
    # mkfs.ext4 rounds inodes up to fill each of its block groups.
    if status.f_files > policy.disk_inodes * 1.1 + 1024:
        yield f"about {policy.disk_inodes} inodes", f"{status.f_files}"


def _equal(what: str, promised: int, observed: int | None) -> Iterator[tuple[str, str]]:
    if observed != promised:
        shown = {None: "no such control on this host", -1: "unlimited"}.get(observed, str(observed))
        yield f"{what} {promised}", shown


def _memory(subject: Subject) -> Iterator[tuple[str, str]]:
    policy, limits = subject.spec.policy, subject.limits
    yield from _equal("memory limit", policy.memory_max_bytes, limits.memory_bytes)
    if limits.oom_killer_off:
        yield "the kernel kills at the memory limit", "it lets processes wait there"
    if not subject.cgroup.is_v2:
        yield from _equal("socket buffer limit", policy.tcp_max_bytes, limits.tcp_bytes)


def _swap(subject: Subject) -> Iterator[tuple[str, str]]:
    limits = subject.limits
    yield from _equal("memory and swap limit", subject.spec.policy.memory_swap_max_bytes, limits.memory_swap_bytes)


def _pids(subject: Subject) -> Iterator[tuple[str, str]]:
    yield from _equal("process limit", subject.spec.policy.pids_max, subject.limits.pids)


def _cpu(subject: Subject) -> Iterator[tuple[str, str]]:
    policy, limits = subject.spec.policy, subject.limits
    shares = shares_to_weight(policy.cpu_shares) if subject.cgroup.is_v2 else policy.cpu_shares
    yield from _equal("CPU weight", shares, limits.cpu_shares)
    if policy.cpu_quota_us:
        yield from _equal("CPU quota", policy.cpu_quota_us, limits.cpu_quota_us)
        yield from _equal("CPU period", CPU_PERIOD_US, limits.cpu_period_us)
        if limits.cpu_burst_us:
            yield "no CPU time saved up for later", f"{limits.cpu_burst_us} us"


def _rlimits(subject: Subject) -> Iterator[tuple[str, str]]:
    for observed in subject.rlimits:
        for limit in subject.spec.policy.rlimits:
            if observed.get(limit.name) != (limit.soft, limit.hard):
                yield f"{limit.name} {limit.soft}:{limit.hard}", f"{observed.get(limit.name)}"


def _oom_score(subject: Subject) -> Iterator[tuple[str, str]]:
    for _, value in living(subject, observe.oom_score_adj):
        yield from _equal("oom_score_adj", subject.spec.policy.oom_score, value)


def _descriptors(subject: Subject) -> Iterator[tuple[str, str]]:
    for pid in subject.pids:
        for fd, what in observe.descriptors(pid).items():
            known = what.startswith(("pipe:[", "socket:[", "/dev/pts/")) or what in ("/dev/null", "/run/gate/fifo")
            if (fd > 2 and what != "/run/gate/fifo") or not known:
                yield "standard input and output only", f"process {pid} holds {fd}: {what}"


def _label(subject: Subject) -> Iterator[tuple[str, str]]:
    if not apparmor.enabled():
        return
    wanted = subject.spec.label
    if not wanted:
        yield "a profile of its own", "none was asked for"
    elif not apparmor.loaded(wanted):
        yield f"{wanted} enforced", "the kernel does not enforce it"
    for pid, label in living(subject, observe.label):
        # crun stacks it upon its own, which confines nothing: "crun//&sandbox-dyno (mixed)". Each must agree.
        if wanted not in label.rpartition(" (")[0].split("//&"):
            yield f"{wanted} in force", f"process {pid}: {label or 'none'}"


CHECKS: dict[Clause, Check] = {
    Clause.UID: _uid,
    Clause.CAPABILITIES: _capabilities,
    Clause.NO_NEW_PRIVILEGES: _no_new_privileges,
    Clause.SECCOMP: _seccomp,
    Clause.NAMESPACES: _namespaces,
    Clause.NETWORK: _network,
    Clause.MOUNTS: _mounts,
    Clause.DEVICES: _devices,
    Clause.DISK: _disk,
    Clause.MEMORY: _memory,
    Clause.SWAP: _swap,
    Clause.PIDS: _pids,
    Clause.CPU: _cpu,
    Clause.RLIMITS: _rlimits,
    Clause.OOM_SCORE: _oom_score,
    Clause.DESCRIPTORS: _descriptors,
    Clause.LABEL: _label,
}
