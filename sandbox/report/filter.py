"""The live system-call filter against the policy: every call number, every ABI, and the arguments that matter."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from sandbox.config import Config
from sandbox.errors import HostError
from sandbox.host import filters
from sandbox.host.filters import Filters
from sandbox.policy import cbpf, seccomp
from sandbox.policy.cbpf import Case
from sandbox.policy.syscall_numbers import LAST, NAMES, NUMBERS

_HIGH = 1 << 32
_SWEEP = LAST + 44  # beyond what this release knows: calls that a newer kernel may have


class Reading(NamedTuple):
    """``decisions``: what the installed filters do to each case; ``stopped_ms``: how long init stood still."""

    digest: str
    programs: int
    instructions: int
    stopped_ms: float
    differences: tuple[str, ...]
    allowed: int  # x86-64 calls that pass with zero arguments
    foreign: int  # i386 and x32 calls that do not end the process
    unknown: int  # numbers above the last known call that pass
    verdicts: dict[str, str]  # of the calls that were asked for

    def verdict(self, call: str, arguments: tuple[int, ...]) -> str:
        """What becomes of one call that was asked for: ALLOW or a refusal."""
        return self.verdicts[spelled(call, arguments)]


Calls = tuple[tuple[str, tuple[int, ...]], ...]


def read(config: Config, pid: int, calls: Calls) -> Reading:
    """Reads and emulates the filters of a dyno's init.

    What given bytes do is a pure function of them: it is computed once and kept under their digest, in a folder that
    only root can write to. The bytes themselves are read from the kernel every time.
    """
    return _reading(config, filters.read(pid), calls)


def _reading(config: Config, found: Filters, calls: Calls) -> Reading:
    digest = hashlib.sha256(b"\0".join(found.programs)).hexdigest()
    known = _Memory(config, digest, calls)
    facts = known.load()
    if facts is None:
        facts = _examine(found.programs, calls)
        known.save(facts)
    size = sum(len(program) // 8 for program in found.programs)
    return Reading(
        digest,
        len(found.programs),
        size,
        found.stopped_ms,
        tuple(facts["differences"]),
        facts["allowed"],
        facts["foreign"],
        facts["unknown"],
        facts["verdicts"],
    )


def without(config: Config, calls: Calls) -> Reading:
    """The reading of a process without a filter: by the same way, of a program that allows everything."""
    return _reading(config, Filters((_ALLOW_ALL,), 0.0), calls)


_ALLOW_ALL = struct.pack("<HBBI", 0x06, 0, 0, cbpf.ALLOW)


def _examine(programs: tuple[bytes, ...], calls: Calls) -> dict[str, Any]:
    native = list(_native())
    asked = [Case(NUMBERS[call], arguments) for call, arguments in calls]
    foreign = [Case(number, (), cbpf.I386) for number in range(_SWEEP)]
    foreign += [Case(number | cbpf.X32_BIT) for number in range(_SWEEP)]
    results = cbpf.decide(programs, [*native, *foreign, *asked])
    differences = []
    allowed = 0
    for case, value in zip(native, results, strict=False):
        call = NAMES.get(case.number, f"call {case.number}")
        promised = seccomp.verdict(call, case.arguments)
        observed = None if value == cbpf.ALLOW else value & 0xFFFF if value & 0xFFFF0000 == cbpf.ERRNO else -1
        allowed += _runs(value) and not case.arguments
        # Runtimes answer ENOSYS for calls that are newer than the newest in the policy: refused all the same.
        if observed != promised and not (promised == 1 and observed == 38 and case.number > NUMBERS["mount_setattr"]):
            differences.append(f"{call}{_hex(case.arguments)}: promised {_say(promised)}, observed {cbpf.name(value)}")
    alive = [
        f"{'i386' if case.arch == cbpf.I386 else 'x32'} call {case.number & 0xFFFF}: {cbpf.name(value)}"
        for case, value in zip(foreign, results[len(native) :], strict=False)
        if value & 0xFFFF0000 not in (cbpf.KILL_PROCESS, cbpf.KILL_THREAD)
    ]
    verdicts = {
        spelled(call, arguments): cbpf.name(value)
        for (call, arguments), value in zip(calls, results[len(results) - len(calls) :], strict=True)
    }
    unknown = sum(_runs(value) for case, value in zip(native, results, strict=False) if case.number > LAST)
    return {
        "differences": differences[:50] + alive[:2],
        "allowed": allowed,
        "foreign": len(alive),
        "unknown": unknown,
        "verdicts": verdicts,
    }


@cache
def spelled(call: str, arguments: tuple[int, ...]) -> str:
    """A call as reports name it: 300 of them in each report of a dyno."""
    return call + (_hex(arguments) or "()")


def _runs(value: int) -> bool:
    """Whether the call may run: everything but a refusal."""
    return value & 0xFFFF0000 not in (cbpf.ERRNO, cbpf.KILL_PROCESS, cbpf.KILL_THREAD, cbpf.TRAP)


def _say(promised: int | None) -> str:
    return "ALLOW" if promised is None else f"ERRNO({promised})"


def _hex(arguments: tuple[int, ...]) -> str:
    return f"({', '.join(f'{a:#x}' for a in arguments)})" if arguments else ""


def _native() -> Iterator[Case]:
    """Every call with no arguments, and the calls that the policy judges by their arguments, low and high words."""
    for number in range(_SWEEP):
        yield Case(number)
    for call, arguments in _arguments():
        yield Case(NUMBERS[call], arguments)
        for position in range(len(arguments)):
            yield Case(NUMBERS[call], (*arguments[:position], arguments[position] | _HIGH, *arguments[position + 1 :]))


def _arguments() -> Iterator[tuple[str, tuple[int, ...]]]:
    for family in range(64):
        for kind in (1, 2, 3):
            yield "socket", (family, kind, 0)
        yield "socketpair", (family, 1, 0)
    for family in (seccomp.INET, seccomp.INET6):
        for kind in (1, 2, 3, 5, 6, 10, 0x801, 0x80002):
            for protocol in (1, 6, 17, 33, 47, 58, 132, 136, 255, 262):
                yield "socket", (family, kind, protocol)
    for protocol in range(1, 23):
        yield "socket", (seccomp.NETLINK, 3, protocol)
    for bit in range(32):
        yield "clone", (1 << bit,)
        yield "personality", (1 << bit,)
        yield "mmap", (0, 4096, 3, 1 << bit)
    for request in (*range(0x5400, 0x5470), *range(0x8900, 0x89A0, 8), *seccomp.IOCTLS, 0x4B01, 0x541C, 0x1261, 0xAA3F):
        yield "ioctl", (0, request)
    for option in (*range(70), *seccomp.PRCTLS):
        yield "prctl", (option,)
    for code in (*seccomp.ARCH_PRCTLS, 0x1011, 0x1021, 0x2001, 0x5006):
        yield "arch_prctl", (code,)
    for level, (bits, options) in seccomp.SOCKET_OPTIONS.items():
        for option in {0, 1, 2, 9, 15, 36, (1 << bits) - 1, 1 << bits, 200, *options}:
            yield "setsockopt", (0, level, option)
    for level in (255, 262, 278, 282, 283, 284, 286):
        yield "setsockopt", (0, level, 1)
    for mode in (0o777, 0o2755, 0o4755, 0o1777):
        yield "chmod", (0, mode)
        yield "fchmod", (0, mode)
        yield "fchmodat", (0, 0, mode)
        yield "creat", (0, mode)
        yield "open", (0, 0o101, mode)
        yield "openat", (0, 0, 0o101, mode)
        for kind in (0, 0o010000, 0o020000, 0o060000, 0o100000, 0o140000):
            yield "mknod", (0, kind | mode)
            yield "mknodat", (0, 0, kind | mode)
    for flags in (1, 2, 4, 8):
        yield "seccomp", (1, flags)
        yield "memfd_create", (0, flags)
    yield "shmget", (0, 4096, 0o4600)


@cache
def _version(calls: Calls) -> str:
    """Of the policy, of what is asked, and of the code that answers: what another version wrote is not read."""
    found = hashlib.sha256(repr((seccomp.document(), calls, _SWEEP)).encode())
    for path in (__file__, cbpf.__file__, seccomp.__file__):
        with open(path, "rb") as file:
            found.update(file.read())
    return found.hexdigest()[:16]


class _Memory:
    """What was computed of a filter before: a file under its digest and this version's."""

    def __init__(self, config: Config, digest: str, calls: Calls) -> None:
        self._folder = f"{config.state_dir}/reports/filters"
        self._path = f"{self._folder}/{digest}.{_version(calls)}.json"

    def load(self) -> dict[str, Any] | None:
        try:
            status = os.stat(self._path)
            if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                raise HostError(f"{self._path} can be written by others than root.", hint=f"remove {self._path}")
            with open(self._path, encoding="utf-8") as file:
                return dict(json.load(file))
        except (FileNotFoundError, ValueError):
            return None

    def save(self, facts: dict[str, Any]) -> None:
        os.makedirs(self._folder, mode=0o700, exist_ok=True)
        draft = f"{self._path}.{os.getpid()}"
        with open(draft, "w", encoding="utf-8") as file:
            json.dump(facts, file)
        os.chmod(draft, 0o600)
        os.rename(draft, self._path)
