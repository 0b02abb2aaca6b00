"""Reads what the kernel enforces on a process, from outside: values only, no judgement.

Everything here comes from /proc of the host, which the dyno cannot forge. What cannot be read raises HostError: an
empty answer must never look like a restriction.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import time
from typing import NamedTuple

from sandbox.errors import HostError

NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
_CAPABILITY_SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
_LIMIT_NAMES = {
    "Max core file size": "CORE",
    "Max file size": "FSIZE",
    "Max locked memory": "MEMLOCK",
    "Max msgqueue size": "MSGQUEUE",
    "Max nice priority": "NICE",
    "Max open files": "NOFILE",
    "Max processes": "NPROC",
    "Max realtime priority": "RTPRIO",
    "Max pending signals": "SIGPENDING",
    "Max stack size": "STACK",
}
_OCTAL = r"\\([0-7]{3})"
_CHASE = 200  # listings of a process whose threads come and go


class Thread(NamedTuple):
    """The credentials of one thread, as host ids."""

    tid: int
    uids: tuple[int, ...]
    gids: tuple[int, ...]
    groups: tuple[int, ...]
    capabilities: dict[str, int]
    no_new_privileges: bool
    seccomp_mode: int
    seccomp_filters: int


class MountLine(NamedTuple):
    """One line of mountinfo. ``flags`` are those of the mount, ``options`` those of the file system."""

    target: str
    root: str
    device: str
    fstype: str
    source: str
    flags: frozenset[str]
    options: str
    propagation: str
    mount_id: int


def threads(pid: int) -> list[Thread]:
    """Every thread of the process: credentials and filters are per thread."""
    found = []
    for tid in _listdir(f"/proc/{pid}/task"):
        try:
            table = _table(f"/proc/{pid}/task/{tid}/status")
        except HostError:
            if os.path.exists(f"/proc/{pid}/task/{tid}"):
                raise
            continue  # it ended between the two calls
        found.append(
            Thread(
                tid=int(tid),
                uids=_numbers(table["Uid"]),
                gids=_numbers(table["Gid"]),
                groups=_numbers(table["Groups"]),
                capabilities={name: int(table[name], 16) for name in _CAPABILITY_SETS},
                no_new_privileges=table["NoNewPrivs"] == "1",
                seccomp_mode=int(table["Seccomp"]),
                # Absent before Linux 5.9.
                seccomp_filters=int(table.get("Seccomp_filters", "-1")),
            )
        )
    if not found:
        raise HostError(f"process {pid} has no threads to examine.")
    return found


def namespace(pid: int | str, kind: str) -> int:
    """The inode of a namespace: equal inodes, same namespace."""
    try:
        text = os.readlink(f"/proc/{pid}/ns/{kind}")
    except OSError as error:
        raise HostError(f"the {kind} namespace of process {pid} cannot be read: {error.strerror}.") from error
    return int(text.split("[")[1].rstrip("]"))


def shares_network(pid: int) -> bool:
    """Whether the process lives in our own network namespace."""
    return namespace(pid, "net") == namespace("self", "net")


def id_map(pid: int, kind: str) -> list[tuple[int, int, int]]:
    """uid_map or gid_map (``kind``: uid, gid) as (inside, outside, count)."""
    rows = [_numbers(line) for line in _read(f"/proc/{pid}/{kind}_map").splitlines()]
    return [(row[0], row[1], row[2]) for row in rows]


def mounts(pid: int | str) -> list[MountLine]:
    """The process's mount table, in order: a later line on the same target hides an earlier one."""
    found = []
    for line in _read(f"/proc/{pid}/mountinfo").splitlines():
        head, _, tail = line.partition(" - ")
        fields = head.split(" ")
        fstype, source, options = tail.split(" ", 2)
        found.append(
            MountLine(
                target=_unescape(fields[4]),
                root=_unescape(fields[3]),
                device=fields[2],
                fstype=fstype,
                source=_unescape(source),
                flags=frozenset(fields[5].split(",")),
                options=options,
                propagation=" ".join(fields[6:]),
                mount_id=int(fields[0]),
            )
        )
    return found


def identity(line: MountLine) -> str:
    """What tells a mount from any other that is put in its place: numbers of the kernel, and what of it is shown."""
    return f"{line.target} {line.mount_id} {line.device} {line.fstype} {line.root}"


def rlimits(pid: int) -> dict[str, tuple[int, int]]:
    """Soft and hard limits by name; -1 is unlimited."""
    found = {}
    for line in _read(f"/proc/{pid}/limits").splitlines()[1:]:
        name = _LIMIT_NAMES.get(line[:26].rstrip())
        if name is not None:
            soft, hard = (-1 if field == "unlimited" else int(field) for field in line[26:].split()[:2])
            found[name] = (soft, hard)
    return found


def oom_score_adj(pid: int) -> int:
    return int(_read(f"/proc/{pid}/oom_score_adj"))


def descriptors(pid: int) -> dict[int, str]:
    """What each open descriptor of the process is."""
    return _descriptors(f"/proc/{pid}/fd")


def _descriptors(folder: str) -> dict[int, str]:
    found = {}
    for name in _listdir(folder):
        try:
            found[int(name)] = os.readlink(f"{folder}/{name}")
        except FileNotFoundError:
            continue
    return found


def tables(pid: int) -> list[int]:
    """Threads of the process that together hold all of its descriptors: a thread may have a table of its own.

    kcmp(2) tells whether two threads share one; without it, every thread counts.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    found: list[int] = []
    for tid in sorted((int(name) for name in _listdir(f"/proc/{pid}/task")), key=lambda tid: tid != pid):
        if not thread_lives(tid):
            continue  # it holds nothing any more
        # 312: kcmp on x86-64; KCMP_FILES is 2. 0: the same table. Of a thread that ends meanwhile nothing is said.
        same = any(libc.syscall(ctypes.c_long(312), known, tid, 2, 0, 0) == 0 for known in found)
        if not same and thread_lives(tid):
            found.append(tid)
    return found


def held(pid: int) -> list[tuple[int, dict[int, str]]]:
    """Every descriptor of the process, by a thread for each of its tables; listed anew when one ends meanwhile."""
    for _ in range(_CHASE):
        found = []
        for tid in tables(pid):
            try:
                found.append((tid, descriptors(tid)))
            except HostError:
                if thread_lives(tid):
                    raise
                break
        else:
            return found
    raise HostError(f"the threads of process {pid} end faster than they can be read.")


def file_system(path: str) -> int:
    """The magic number of the file system that the path lies on, see statfs(2)."""
    buffer = ctypes.create_string_buffer(256)
    if ctypes.CDLL(None, use_errno=True).statfs(path.encode(), buffer) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)
    return int.from_bytes(buffer.raw[:8], "little")


def mount_of(path: str) -> int:
    """The id of the mount on which what the path leads to lies, see fdinfo in proc(5); links of /proc are followed.

    Device numbers would not do: an overlay shows those of its layers.
    """
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        return int(_table(f"/proc/self/fdinfo/{fd}")["mnt_id"])
    finally:
        os.close(fd)


def interfaces(pid: int) -> list[str]:
    """The network interfaces in the process's network namespace."""
    return [line.split(":")[0].strip() for line in _read(f"/proc/{pid}/net/dev").splitlines()[2:]]


def listens(pid: int, port: int) -> bool:
    """Whether something in the process's network namespace accepts TCP connections on ``port``."""
    wanted = f":{port:04X}"
    for family in ("tcp", "tcp6"):
        try:
            lines = _read(f"/proc/{pid}/net/{family}").splitlines()[1:]
        except HostError:
            continue  # a kernel without IPv6 has no tcp6
        for line in lines:
            fields = line.split()
            if fields[1].endswith(wanted) and fields[3] == "0A":  # TCP_LISTEN
                return True
    return False


def name(pid: int) -> str:
    """The process's own name for itself: foreign text."""
    return _read(f"/proc/{pid}/comm").strip()


def alive(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


def status(pid: int) -> dict[str, str]:
    """The fields of /proc/PID/status."""
    return _table(f"/proc/{pid}/status")


def label(pid: int) -> str:
    """The AppArmor label of a process, with its mode; empty when the kernel gives none."""
    try:
        with open(f"/proc/{pid}/attr/current", encoding="utf-8", errors="backslashreplace") as file:
            return file.read().strip("\0\n ")
    except FileNotFoundError:
        return ""
    except OSError as error:
        # EINVAL: no module that labels is on.
        if error.errno == errno.EINVAL:
            return ""
        raise HostError(f"the label of process {pid} cannot be read: {error.strerror}.") from error


def ended(pid: int | str) -> bool:
    """Whether the process is gone, or all of its threads are: there is nothing left of it to examine."""
    return living_thread(int(pid)) is None


def living_thread(pid: int) -> int | None:
    """A thread of the process that lives: the first one, unless that ended before the others; None when none does.

    A process whose first thread has ended is a zombie to look at, and runs on in its other threads. Threads that each
    start the next one and end are listed anew until one is met: HostError when that never happens.
    """
    for turn in range(_CHASE):
        if turn > _CHASE // 10:
            time.sleep(0.001)
        if thread_lives(pid):
            return pid
        try:
            names = [name for name in _listdir(f"/proc/{pid}/task") if name != str(pid)]
        except HostError:
            return None
        for name in names:
            if thread_lives(int(name)):
                return int(name)
        if not names:
            return None
    raise HostError(f"the threads of process {pid} end faster than they can be read.")


def thread_lives(tid: int) -> bool:
    """Whether that thread is there and has not ended."""
    try:
        return _stat_fields(tid)[0] not in ("Z", "X")
    except HostError:
        return False


def scheduling(tid: int) -> tuple[int, int]:
    """The nice value of a thread and its scheduling policy, see sched(7) and proc_pid_stat(5)."""
    fields = _stat_fields(tid)
    return int(fields[16]), int(fields[38])


def pidfd(path: str) -> int:
    """The process that a pidfd names, by its fdinfo: its number here, 0 when it has none here, -1 when it has ended."""
    return int(_table(path).get("Pid", "0"))


def start_ticks(pid: int) -> int:
    """When the process started, in clock ticks since boot: with the pid, the identity of a process."""
    return int(_stat_fields(pid)[19])


def parent(pid: int) -> int:
    """The parent's pid; 0 when it is outside of what we see."""
    return int(_stat_fields(pid)[1])


def _stat_fields(pid: int | str) -> list[str]:
    """The fields of /proc/PID/stat after the name, which is foreign text and may hold spaces and brackets."""
    return _read(f"/proc/{pid}/stat").rpartition(")")[2].split()


def boot_id() -> str:
    return _read("/proc/sys/kernel/random/boot_id").strip()


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="backslashreplace") as file:
            return file.read()
    except OSError as error:
        raise HostError(f"{path} cannot be read: {error.strerror}.") from error


def _listdir(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError as error:
        raise HostError(f"{path} cannot be read: {error.strerror}.") from error


def _table(path: str) -> dict[str, str]:
    rows = (line.partition(":") for line in _read(path).splitlines())
    return {key: value.strip() for key, _, value in rows}


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(field) for field in text.split())


def _unescape(text: str) -> str:
    return re.sub(_OCTAL, lambda match: chr(int(match[1], 8)), text) if "\\" in text else text
