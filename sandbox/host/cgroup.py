"""Reads a dyno's cgroup, on v1 hierarchies and on the unified one, and ends what lives in it.

The engine writes the limits; we read them back. A control file that is not there is reported as None: not enforced.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
import time
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from sandbox.errors import HostError

ROOT = "/sys/fs/cgroup"
# v1 reports "no limit" as the largest multiple of the page size in a signed 64-bit number.
_V1_UNLIMITED = 0x7FFFFFFFFFFFF000
_CONTROLLERS = ("memory", "pids", "cpu", "cpuacct", "devices", "freezer")


class Limits(NamedTuple):
    """What the kernel enforces now. None: the control does not exist; -1: exists and is unlimited."""

    memory_bytes: int | None
    memory_swap_bytes: int | None
    tcp_bytes: int | None  # v2 counts socket buffers as memory and has no such control
    pids: int | None
    cpu_quota_us: int | None
    cpu_period_us: int | None
    cpu_shares: int | None
    devices: tuple[str, ...] | None
    cpu_burst_us: int | None = None  # Linux 5.14: quota that was not used, and may be later
    oom_killer_off: bool = False  # v1: at the limit processes wait instead of being killed


class Usage(NamedTuple):
    """What the dyno uses and used; bytes and microseconds. Peaks are the kernel's own where it keeps them."""

    memory_bytes: int = 0
    rss_bytes: int = 0
    cache_bytes: int = 0
    swap_bytes: int = 0
    memory_peak_bytes: int = 0
    pids: int = 0
    pids_peak: int = 0
    pids_refused: int = 0
    cpu_us: int = 0
    oom_kills: int = 0


def unified() -> bool:
    """Whether all controllers live in one v2 hierarchy at /sys/fs/cgroup."""
    return os.path.exists(f"{ROOT}/cgroup.controllers")


def device_programs(path: str) -> int | None:
    """How many device-filter programs are attached to a v2 cgroup; None when the kernel does not say.

    bpf(BPF_PROG_QUERY) with BPF_CGROUP_DEVICE: v2 has no devices.list to read.
    """
    number = {"x86_64": 321, "aarch64": 280}.get(os.uname().machine)
    if number is None:
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # union bpf_attr.query: target_fd, attach_type (6), query_flags, attach_flags, prog_ids, prog_cnt, padding.
        attr = ctypes.create_string_buffer(struct.pack("=IIIIQI", fd, 6, 0, 0, 0, 0), 64)
        # The count is filled in although no room for ids was given.
        if libc.syscall(ctypes.c_long(number), 16, attr, 64) < 0 and ctypes.get_errno() != errno.ENOSPC:
            return None
        return int(struct.unpack_from("=I", attr.raw, 24)[0])
    finally:
        os.close(fd)


def shares_to_weight(shares: int) -> int:
    """cpu.shares as cpu.weight, by the formula that runc, crun and systemd share."""
    return 1 + ((shares - 2) * 9999) // 262142


@cache
def _hierarchies() -> dict[str, str]:
    """Controller (or ``""`` for a v2 tree) → mount point, from this process's own mount table."""
    found: dict[str, str] = {}
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        for line in file:
            head, _, tail = line.partition(" - ")
            fstype, _, options = tail.split(" ", 2)
            target = head.split(" ")[4]
            if fstype == "cgroup2":
                found.setdefault("", target)
            elif fstype == "cgroup":
                for option in options.strip().split(","):
                    if option in _CONTROLLERS or option.startswith("name="):
                        found.setdefault(option, target)
                if not any(target == known for known in found.values()):
                    found.setdefault(target, target)
    return found


class Cgroup:
    """One cgroup, given by its path in each hierarchy."""

    def __init__(self, paths: dict[str, str]) -> None:
        self.paths = paths
        self.is_v2 = unified()

    @classmethod
    def at(cls, path: str) -> Cgroup:
        """The cgroup of that name in every hierarchy of this host, existing or not."""
        return cls({key: target + path for key, target in _hierarchies().items()})

    @classmethod
    def of(cls, pid: int) -> Cgroup:
        """The cgroup in which the process lives. HostError when it is gone."""
        hierarchies = _hierarchies()
        paths: dict[str, str] = {}
        try:
            with open(f"/proc/{pid}/cgroup", encoding="utf-8") as file:
                for line in file:
                    _, controllers, path = line.rstrip("\n").split(":", 2)
                    for name in controllers.split(",") if controllers else [""]:
                        if name in hierarchies:
                            paths[name] = hierarchies[name] + path.rstrip("/")
        except OSError as error:
            raise HostError(f"process {pid} ended before its cgroup could be read.") from error
        return cls(paths)

    def _file(self, controller: str, name: str) -> str | None:
        base = self.paths.get("" if self.is_v2 else controller)
        return None if base is None else f"{base}/{name}"

    def _text(self, controller: str, name: str) -> str | None:
        path = self._file(controller, name)
        if path is None:
            return None
        try:
            with open(path, encoding="ascii") as file:
                return file.read().strip()
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP):
                return None
            raise

    def _number(self, controller: str, name: str) -> int | None:
        text = self._text(controller, name)
        if text is None:
            return None
        value = -1 if text == "max" else int(text.split()[0])
        return -1 if value >= _V1_UNLIMITED else value

    def _table(self, controller: str, name: str) -> dict[str, int]:
        text = self._text(controller, name) or ""
        pairs = (line.split() for line in text.splitlines())
        return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].lstrip("-").isdigit()}

    def limits(self) -> Limits:
        """The limits in force, read from the kernel."""
        if self.is_v2:
            memory, swap = self._number("", "memory.max"), self._number("", "memory.swap.max")
            total = None if memory is None or swap is None else -1 if -1 in (memory, swap) else memory + swap
            quota, period = self._v2_cpu()
            weight = self._number("", "cpu.weight")
            programs = device_programs(self.paths[""])
            filters = None if programs is None else (f"bpf {programs}",)
            burst, pids = self._number("", "cpu.max.burst"), self._number("", "pids.max")
            return Limits(memory, total, None, pids, quota, period, weight, filters, burst)
        devices = self._text("devices", "devices.list")
        return Limits(
            self._number("memory", "memory.limit_in_bytes"),
            self._number("memory", "memory.memsw.limit_in_bytes"),
            self._number("memory", "memory.kmem.tcp.limit_in_bytes"),
            self._number("pids", "pids.max"),
            self._number("cpu", "cpu.cfs_quota_us"),
            self._number("cpu", "cpu.cfs_period_us"),
            self._number("cpu", "cpu.shares"),
            None if devices is None else tuple(devices.splitlines()),
            self._number("cpu", "cpu.cfs_burst_us"),
            bool(self._table("memory", "memory.oom_control").get("oom_kill_disable")),
        )

    def _v2_cpu(self) -> tuple[int | None, int | None]:
        text = self._text("", "cpu.max")
        if text is None:
            return None, None
        quota, period = text.split()
        return -1 if quota == "max" else int(quota), int(period)

    def limit_tcp(self, most: int) -> None:
        """Bounds the socket buffers of a v1 cgroup, which its memory limit does not count; runc no longer does.

        Measured without it: 400 MiB queued on loopback by a dyno whose memory limit was 128 MiB.
        """
        path = self._file("memory", "memory.kmem.tcp.limit_in_bytes")
        if not self.is_v2 and path is not None:
            _write(path, str(most))

    def usage(self) -> Usage:
        """What is used now, and the peaks so far; zeros for what this kernel does not count."""
        stat = self._table("memory", "memory.stat")
        if self.is_v2:
            events = self._table("", "memory.events")
            return Usage(
                memory_bytes=self._number("", "memory.current") or 0,
                rss_bytes=stat.get("anon", 0),
                cache_bytes=stat.get("file", 0),
                swap_bytes=self._number("", "memory.swap.current") or 0,
                memory_peak_bytes=self._number("", "memory.peak") or 0,
                pids=self._number("", "pids.current") or 0,
                pids_peak=self._number("", "pids.peak") or 0,
                pids_refused=self._table("", "pids.events").get("max", 0),
                cpu_us=self._table("", "cpu.stat").get("usage_usec", 0),
                oom_kills=events.get("oom_kill", 0),
            )
        memory, both = (self._number("memory", f"memory.{kind}usage_in_bytes") or 0 for kind in ("", "memsw."))
        return Usage(
            memory_bytes=memory + (self._number("memory", "memory.kmem.tcp.usage_in_bytes") or 0),
            rss_bytes=stat.get("total_rss", 0),
            cache_bytes=stat.get("total_cache", 0),
            swap_bytes=max(0, both - memory),
            memory_peak_bytes=self._number("memory", "memory.max_usage_in_bytes") or 0,
            pids=self._number("pids", "pids.current") or 0,
            pids_peak=self._number("pids", "pids.peak") or 0,
            pids_refused=self._table("pids", "pids.events").get("max", 0),
            cpu_us=(self._number("cpuacct", "cpuacct.usage") or 0) // 1000,
            oom_kills=self._table("memory", "memory.oom_control").get("oom_kill", 0),
        )

    def pids(self) -> tuple[int, ...]:
        """Every process in the cgroup and below, in whatever hierarchy it is listed."""
        key = "" if self.is_v2 else "pids" if "pids" in self.paths else next(iter(self.paths), None)
        if key is None:
            return ()
        found: dict[int, None] = {}
        for folder in _walk(self.paths[key]):
            try:
                with open(f"{folder}/cgroup.procs", encoding="ascii") as file:
                    found.update(dict.fromkeys(int(line) for line in file))
            except OSError:
                continue  # removed between the two calls
        return tuple(found)

    def signal(self, number: int, *, but: int) -> int:
        """Sends a signal to every process ``but`` one; returns to how many. Pids are pinned meanwhile."""
        sent = 0
        for pid in self.pids():
            if pid == but:
                continue
            try:
                fd = os.pidfd_open(pid)
            except OSError:
                continue
            try:
                # The pid may have been reused between the listing and pidfd_open: look again before shooting.
                if pid in self.pids():
                    signal.pidfd_send_signal(fd, number)
                    sent += 1
            except OSError:
                continue
            finally:
                os.close(fd)
        return sent

    def kill(self, *, deadline_s: float = 10.0) -> bool:
        """SIGKILL until nothing is left; whether the cgroup is empty before the deadline.

        v2 has one file for it (cgroup.kill, 5.14) that a fork cannot outrun. On v1 the cgroup is frozen first, so
        that a fork bomb stands still while it is shot.
        """
        deadline = time.monotonic() + deadline_s
        while self.pids():
            if time.monotonic() > deadline:
                return False
            if not self._write_file("", "cgroup.kill", "1"):
                self._freeze("FROZEN")
                for pid in self.pids():
                    _shoot(pid)
                self._freeze("THAWED")
            time.sleep(0.002)
        return True

    def _freeze(self, state: str) -> None:
        for folder in _walk(self.paths.get("freezer", "")):
            _write(f"{folder}/freezer.state", state)

    def _write_file(self, controller: str, name: str, text: str) -> bool:
        return self.is_v2 and _write(f"{self.paths[controller]}/{name}", text)

    def remove(self, *, deadline_s: float = 5.0) -> bool:
        """Removes the empty cgroup, its children and nothing else; whether it is gone from every hierarchy."""
        deadline = time.monotonic() + deadline_s
        for path in set(self.paths.values()):
            for folder in reversed(list(_walk(path))):
                while not _rmdir(folder):
                    # A killed process leaves its cgroup when it is reaped, a moment later.
                    if time.monotonic() > deadline:
                        return False
                    time.sleep(0.002)
        return True

    def exists(self) -> bool:
        return any(os.path.isdir(path) for path in self.paths.values())

    def oom_event(self) -> int | None:
        """A descriptor that becomes readable when the kernel kills in this cgroup for memory; None if it cannot.

        v1: an eventfd registered with memory.oom_control. v2: an inotify watch on memory.events, which the kernel
        modifies at each event.
        """
        if self.is_v2:
            path = self._file("", "memory.events")
            return None if path is None else _watch_modify(path)
        control = self._file("memory", "memory.oom_control")
        registry = self._file("memory", "cgroup.event_control")
        if control is None or registry is None:
            return None
        event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            fd = os.open(control, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if _write(registry, f"{event} {fd}"):
                    return event
            finally:
                os.close(fd)
        except OSError:
            pass
        os.close(event)
        return None


def _walk(path: str) -> Iterator[str]:
    """The folder and all below it, parents first; nothing when it does not exist."""
    if not path or not os.path.isdir(path):
        return
    yield path
    for folder, names, _ in os.walk(path):
        for name in names:
            yield f"{folder}/{name}"


def _rmdir(path: str) -> bool:
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno in (errno.EBUSY, errno.ENOTEMPTY):
            return False
        raise
    return True


def _shoot(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _write(path: str, text: str) -> bool:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.write(fd, text.encode())
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _watch_modify(path: str) -> int | None:
    libc = ctypes.CDLL(None, use_errno=True)
    fd = int(libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))
    if fd < 0:
        return None
    if libc.inotify_add_watch(fd, path.encode(), 2) < 0:  # IN_MODIFY
        os.close(fd)
        return None
    return fd
