"""One dyno's wall as a frozen value with a digest: size + flags + host facts in, everything enforced out."""

from __future__ import annotations

import hashlib
import json
from typing import NamedTuple

from sandbox.errors import PolicyError
from sandbox.policy import apparmor, mounts, seccomp
from sandbox.policy.clauses import Clause
from sandbox.policy.egress import NOTHING, Egress
from sandbox.policy.sizes import Size, Traffic
from sandbox.units import MIB, format_bytes

VERSION = 3
CPU_PERIOD_US = 100_000
MIN_MEMORY_BYTES = 16 * MIB
OOM_SCORE = 500
_PAGE = 4096  # bytes; the kernel counts memory in these


class Rlimit(NamedTuple):
    """One resource limit, soft and hard; ``name`` as in getrlimit(2), without RLIMIT_."""

    name: str
    soft: int
    hard: int


class Policy(NamedTuple):
    """Everything that is enforced on one dyno. Sizes in bytes, times in microseconds."""

    size: str
    memory_quota_bytes: int  # over it: R14
    memory_kill_bytes: int  # at it: R15
    memory_max_bytes: int  # the cgroup's memory limit
    memory_swap_max_bytes: int  # the cgroup's limit on memory and swap together
    tcp_max_bytes: int  # v1 only: socket buffers, which its memory limit does not count
    pids_max: int
    cpu_shares: int
    cpu_quota_us: int  # per CPU_PERIOD_US; 0 = no cap
    disk_bytes: int
    disk_inodes: int
    shm_bytes: int
    shm_inodes: int
    rlimits: tuple[Rlimit, ...]
    egress: Egress
    traffic: Traffic
    oom_score: int = OOM_SCORE
    waived: frozenset[Clause] = frozenset()

    def holds(self, clause: Clause) -> bool:
        return clause not in self.waived

    def digest(self) -> str:
        """SHA-256 over every value of the policy, the mount plan and the system-call document."""
        value = self._asdict() | {"egress": self.egress.document(), "waived": sorted(c.value for c in self.waived)}
        plan = [[m.target, m.source.value, m.path, m.read_only, m.exec] for m in mounts.PLAN]
        document = [
            VERSION,
            value,
            plan,
            mounts.MASKED,
            mounts.READ_ONLY,
            mounts.DEVICES,
            seccomp.document(),
            apparmor.profile(),
        ]
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def make(
    size: Size,
    *,
    host_memory_bytes: int,
    swap: bool,
    memory_bytes: int | None = None,
    cpus: float | None = None,
    pids: int | None = None,
    disk_bytes: int | None = None,
    waived: frozenset[Clause] = frozenset(),
    egress: Egress = NOTHING,
) -> Policy:
    """The policy of a size with overrides that only go down.

    ``swap``: the host has swap. Then the quota is the memory limit and the dyno swaps up to the kill limit, as at
    Heroku; without swap the memory limit is the kill limit less a page, and the band between quota and kill limit is
    counted. The page is left for swap, which the host does not have: where that limit would be 0, runc 1.1.5 tells
    systemd of none, and systemd writes "max" in its place at the next daemon-reload (Docker on Debian 12).

    Raises PolicyError for an override above the size or below what a process needs, and for a quota above the
    host's memory.
    """
    quota = _lower(memory_bytes, size.memory_bytes, "memory", MIN_MEMORY_BYTES, size.name, bytes_=True)
    kill = size.kill_bytes * quota // size.memory_bytes
    if quota > host_memory_bytes:
        raise PolicyError(
            f"size {size.name} needs {format_bytes(quota)} of memory, this host has {format_bytes(host_memory_bytes)}.",
            hint="choose a smaller --size.",
        )
    processes = _lower(pids, size.pids, "pids", 8, size.name)
    disk = _lower(disk_bytes, size.disk_bytes, "disk", 16 * MIB, size.name, bytes_=True)
    cap = size.cpus if cpus is None else cpus
    if cpus is not None and (not 0.01 <= cpus <= 1024 or (size.cpus and cpus > size.cpus)):
        raise PolicyError(
            f"--cpus {cpus:g} is not between 0.01 and the {size.cpus or 1024:g} of size {size.name}.",
            hint="overrides go down; a larger --size gives more.",
        )
    return Policy(
        size=size.name,
        memory_quota_bytes=quota,
        memory_kill_bytes=kill,
        memory_max_bytes=quota if swap else kill - _PAGE,
        memory_swap_max_bytes=kill,
        tcp_max_bytes=quota // 8,
        pids_max=processes,
        cpu_shares=size.cpu_shares,
        cpu_quota_us=round(cap * CPU_PERIOD_US),
        disk_bytes=disk,
        # mkfs rounds inode counts to whole groups; the image is checked against what mkfs made.
        disk_inodes=max(1024, size.disk_inodes * disk // size.disk_bytes),
        shm_bytes=min(64 * MIB, quota // 4),
        shm_inodes=4096,
        rlimits=_rlimits(processes, disk),
        egress=egress,
        traffic=size.traffic,
        waived=waived,
    )


def for_build(size: Size, *, host_memory_bytes: int, swap: bool, egress: Egress = NOTHING) -> Policy:
    """The policy of a build or fetch dyno: the same wall, with more room on disk and no CPU cap."""
    base = make(size, host_memory_bytes=host_memory_bytes, swap=swap, egress=egress)
    disk = 4 * 1024 * MIB
    return base._replace(disk_bytes=disk, disk_inodes=262_144, cpu_quota_us=0, rlimits=_rlimits(base.pids_max, disk))


def _lower(value: int | None, top: int, what: str, least: int, size: str, *, bytes_: bool = False) -> int:
    if value is None:
        return top
    if not least <= value <= top:
        text = format_bytes if bytes_ else str
        raise PolicyError(
            f"--{what} {text(value)} is not between {text(least)} and the {text(top)} of size {size}.",
            hint="overrides go down; a larger --size gives more.",
        )
    return value


def _rlimits(pids: int, disk_bytes: int) -> tuple[Rlimit, ...]:
    """RLIMIT_NPROC repeats the pids limit because apps read their size from ``ulimit -u`` (256 on a 1x).

    10,000 open files is the figure commonly reported for Heroku; no source confirms it.
    """
    return (
        Rlimit("CORE", 0, 0),
        Rlimit("FSIZE", disk_bytes, disk_bytes),
        Rlimit("MEMLOCK", 65536, 65536),
        Rlimit("MSGQUEUE", 819200, 819200),
        Rlimit("NICE", 0, 0),
        Rlimit("NOFILE", 10000, 10000),
        Rlimit("NPROC", pids, pids),
        Rlimit("RTPRIO", 0, 0),
        Rlimit("SIGPENDING", 1024, 1024),
        Rlimit("STACK", 8 * MIB, 8 * MIB),
    )
