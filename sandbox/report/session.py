"""The questions to a twin's prober that need no time: calls, files, sockets."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from typing import Any

from sandbox.config import Config
from sandbox.report import twin as twins
from sandbox.report.twin import Twin

Json = dict[str, Any]
QUICK = ("calls", "abi", "ids", "files", "sockets")
_FAMILIES = [n for n in range(46) if n not in (1, 2, 10, 16)]
_NETLINK = [4, 6, 9, 11, 12, 15, 16, 21]


def quick(twin: Twin, home: Config, *, groups: Iterable[str] = QUICK, gentle: bool = False) -> Json:
    """Everything that needs no time: calls, files, sockets. ``gentle``: nothing that loads kernel modules."""
    abstract = f"sandbox-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as link:
        link.bind("\0" + abstract)
        link.listen(1)
        return twin.prober.ask(
            *groups,
            ids={"host_pid": os.getpid()},
            files={
                "host_paths": [home.state_dir, home.run_dir, "/var/lib/docker", "/run/docker"],
                "others": [home.state_dir, home.run_dir, home.dynos_dir, "/var/lib/docker", "/root/.ssh"],
                "abstract": abstract,
                "canary": twins.canary(),
            },
            sockets={"families": [17] if gentle else _FAMILIES, "netlink": _NETLINK},
        )


def aio() -> int:
    """Asynchronous I/O contexts in use on the whole host."""
    with open("/proc/sys/fs/aio-nr", encoding="ascii") as file:
        return int(file.read())
