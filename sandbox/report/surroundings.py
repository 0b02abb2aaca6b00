"""What all dynos of an instance have in common, each part read when it is first needed: once for a report of many."""

from __future__ import annotations

import os
from functools import cached_property

from sandbox.config import Config
from sandbox.dyno import record as records
from sandbox.dyno.record import Record
from sandbox.errors import HostError
from sandbox.host import observe
from sandbox.report import wall

# The lists of proc_net(5), and in which column the inode stands.
_SOCKETS = (
    *((name, 9) for name in ("tcp", "tcp6", "udp", "udp6", "udplite", "udplite6", "raw", "raw6", "netlink")),
    ("unix", 6),
    ("packet", 8),
)


class Surroundings:
    """The router, the other dynos and the processes of this host, as they were when each was first asked for."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._namespaces: dict[int, dict[str, int]] = {}

    @cached_property
    def wall(self) -> wall.Shared:
        return wall.shared(self._config)

    @cached_property
    def living(self) -> list[Record]:
        """Every live dyno of this instance."""
        return records.live(self._config)

    @cached_property
    def processes(self) -> dict[int, list[str]]:
        """Every process of this host that lives, by the inode of its process namespace."""
        found: dict[int, list[str]] = {}
        for name in os.listdir("/proc"):
            try:
                # A first thread that has ended is in no namespace any more, its others are.
                thread = observe.living_thread(int(name)) if name.isdigit() else None
                if thread is not None:
                    found.setdefault(observe.namespace(thread, "pid"), []).append(name)
            except HostError:
                continue
        return found

    @cached_property
    def sockets(self) -> frozenset[str]:
        """The inodes of the sockets that are bound, connected or listening in our own network namespace."""
        found = set()
        for name, column in _SOCKETS:
            try:
                with open(f"/proc/self/net/{name}", encoding="utf-8", errors="replace") as file:
                    next(file)
                    found |= {line.split()[column] for line in file}
            except FileNotFoundError:
                continue  # a kernel without that protocol
        return frozenset(found)

    def namespaces(self, other: Record) -> dict[str, int]:
        """The namespaces of another dyno, by kind; empty when it has ended."""
        if other.pid not in self._namespaces:
            try:
                found = {kind: observe.namespace(other.pid, kind) for kind in observe.NAMESPACES}
            except HostError:
                found = {}
            # Asked afterwards: then they were of this process, and not of one that got its number.
            self._namespaces[other.pid] = found if records.still(other) else {}
        return self._namespaces[other.pid]
