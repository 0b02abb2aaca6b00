"""The clauses of the wall: each is a promise that can be read back from the kernel, refused on, or waived by name."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from sandbox.errors import UsageError
from sandbox.units import show


class Clause(Enum):
    """A promise. The value is the name in messages and for ``--waive``; ``promise`` says it to a person."""

    UID = "uid"
    CAPABILITIES = "capabilities"
    NO_NEW_PRIVILEGES = "no-new-privileges"
    SECCOMP = "seccomp"
    NAMESPACES = "namespaces"
    NETWORK = "network"
    MOUNTS = "mounts"
    DEVICES = "devices"
    DISK = "disk"
    MEMORY = "memory"
    SWAP = "swap"
    PIDS = "pids"
    CPU = "cpu"
    RLIMITS = "rlimits"
    OOM_SCORE = "oom-score"
    DESCRIPTORS = "descriptors"
    LABEL = "label"

    @property
    def promise(self) -> str:
        return _PROMISES[self]


_PROMISES = {
    Clause.UID: "runs as an unprivileged host id that no other dyno has",
    Clause.CAPABILITIES: "no thread has a capability in any set",
    Clause.NO_NEW_PRIVILEGES: "no program can gain rights when it is started",
    Clause.SECCOMP: "every thread runs under a system-call filter",
    Clause.NAMESPACES: "processes, mounts, IPC, host name, network and cgroups are its own",
    Clause.NETWORK: "reaches what its egress allows through the host firewall, and nothing local",
    Clause.MOUNTS: "sees the planned mounts, with their flags, and no other",
    Clause.DEVICES: "can open harmless devices only",
    Clause.DISK: "what it writes to disk is bounded in bytes and in files",
    Clause.MEMORY: "memory ends at the limit",
    Clause.SWAP: "memory and swap together end at the limit",
    Clause.PIDS: "processes and threads end at the limit",
    Clause.CPU: "CPU time has a weight and a cap",
    Clause.RLIMITS: "open files, core dumps, locked memory and the like end at the limit",
    Clause.OOM_SCORE: "the kernel kills it before the host's own services",
    Clause.LABEL: "an AppArmor profile of its own is enforced, where AppArmor is on",
    Clause.DESCRIPTORS: "inherits no descriptor but its own input and output",
}


def parse_waivers(names: Iterable[str]) -> frozenset[Clause]:
    """The clauses of those names; UsageError lists those there are."""
    known = {clause.value: clause for clause in Clause}
    waived = set()
    for name in names:
        if name not in known:
            raise UsageError(f"there is no clause {show(name)} to waive.", hint="clauses: " + ", ".join(sorted(known)))
        waived.add(known[name])
    return frozenset(waived)
