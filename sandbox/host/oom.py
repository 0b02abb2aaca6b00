"""Who the kernel killed for memory, from its own log: cgroup counters know how many, the log knows whom."""

from __future__ import annotations

import os
import re

from sandbox.units import escape

# mm/oom_kill.c, dump_oom_victim: one line per kill, since Linux 5.0.
_KILL = rb"oom-kill:.*?oom_memcg=(?P<group>[^,]*),.*?task=(?P<task>.*),pid=(?P<pid>\d+),uid=(?P<uid>\d+)"


class KernelLog:
    """The kernel's log from now on. Reads nothing when the host does not let us (then ``victims`` is empty)."""

    def __init__(self) -> None:
        try:
            self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._fd, 0, os.SEEK_END)
        except OSError:
            self._fd = -1
        self._seen: list[tuple[bytes, str]] = []

    def victims(self, cgroup: str) -> list[str]:
        """``pid 41, python3`` for every process killed so far because that cgroup, or one below, was full."""
        self._read()
        wanted = cgroup.encode()
        return [who for group, who in self._seen if group == wanted or group.startswith(wanted + b"/")]

    def _read(self) -> None:
        while self._fd >= 0:
            try:
                record = os.read(self._fd, 8192)
            except BlockingIOError:
                return
            except OSError:
                continue  # EPIPE: records were overwritten before we read them; the next read goes on after the gap
            match = re.search(_KILL, record)
            if match:
                task = escape(match["task"].decode("utf-8", "backslashreplace"))
                self._seen.append((match["group"], f"pid {int(match['pid'])}, {task}"))

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
