"""What has to be done inside a container's namespaces, in a short-lived child: namespaces are per thread.

Only while the gate is shut: the container then holds our init and our gate from the read-only stack, and no
instruction of the app.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from sandbox.errors import HostError
from sandbox.host import syscalls as sys


def _in_child(action: Callable[[], None], what: str) -> None:
    pid = os.fork()
    if pid == 0:  # pragma: no cover - the child never returns
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    if status != 0:
        raise HostError(f"{what} failed inside the container.")


def restrict_engine_mounts(pid: int) -> None:
    """What Docker leaves out on its own mounts: nosuid and nodev on /, noexec on /dev, and no tie to the host's /.

    Docker makes the container's root a slave of the host's mount: what the host mounts below it would show up inside.
    """
    fd = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)

    def action() -> None:
        sys.setns(fd, sys.CLONE_NEWNS)
        sys.restrict_mount("/", attributes=sys.ATTR_RDONLY | sys.ATTR_NOSUID | sys.ATTR_NODEV)
        sys.restrict_mount("/dev", attributes=sys.ATTR_NOSUID | sys.ATTR_NOEXEC)

    try:
        _in_child(action, "restricting the root file system")
    finally:
        os.close(fd)


def connect(pid: int, port: int, request: bytes, *, timeout_s: float) -> bytes:
    """Sends ``request`` to the app's port from within its network namespace and returns the answer.

    The child is in the dyno's network namespace only, not in its process or mount namespaces: the app can neither
    see nor trace it.
    """
    import socket  # only this one-shot request needs it

    fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    read_end, write_end = os.pipe()

    def action() -> None:
        sys.setns(fd, sys.CLONE_NEWNET)
        with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as connection:
            connection.sendall(request)
            with os.fdopen(write_end, "wb") as out:
                total = 0
                while total < 65536 and (piece := connection.recv(65536)):
                    total += len(piece)
                    out.write(piece[:65536])

    child = os.fork()
    if child == 0:  # pragma: no cover - the child never returns
        status = 1
        try:
            os.close(read_end)
            action()
            status = 0
        finally:
            os._exit(status)
    os.close(fd)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as answer:
        text = answer.read()
    _, status = os.waitpid(child, 0)
    if status != 0:
        raise HostError(f"nothing answered on port {port} inside the dyno.")
    return text
