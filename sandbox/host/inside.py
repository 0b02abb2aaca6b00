"""What has to be done inside a container's namespaces, in a short-lived child: namespaces are per thread.

Only while the gate is shut: the container then holds our init and our gate from the read-only stack, and no
instruction of the app.
"""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Callable

from sandbox.errors import HostError
from sandbox.host import syscalls as sys


def in_child(action: Callable[[], None], what: str) -> None:
    """Does something in a child of ours, which may enter namespaces; HostError when it failed."""
    pid = os.fork()
    if pid == 0:  # pragma: no cover - the child never returns
        status = 1
        try:
            sys.become_child()
            action()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    if status != 0:
        raise HostError(f"{what} failed inside the container.")


def restrict_engine_mounts(pid: int, *, max_terminals: int) -> None:
    """Adds what Docker leaves out on its own mounts.

    nosuid and nodev on /, noexec on /dev, a bound on terminals, and no tie to the host: Docker makes the container's
    root a slave of the host's mount, and what the host mounts below it would show up inside.
    """
    fd = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)

    def action() -> None:
        sys.setns(fd, sys.CLONE_NEWNS)
        sys.restrict_mount("/", attributes=sys.ATTR_RDONLY | sys.ATTR_NOSUID | sys.ATTR_NODEV)
        sys.restrict_mount("/dev", attributes=sys.ATTR_NOSUID | sys.ATTR_NOEXEC)
        # Terminals come from one pool of the host; without a bound of its own, one dyno can take them all.
        flags = sys.MS_REMOUNT | sys.MS_NOSUID | sys.MS_NOEXEC
        sys.mount("devpts", "/dev/pts", "devpts", flags, f"ptmxmode=0666,mode=0620,gid=5,max={max_terminals}")

    try:
        in_child(action, "restricting the root file system")
    finally:
        os.close(fd)


_NS_GET_USERNS = 0xB701  # linux/nsfs.h


def namespace_owners(pid: int) -> dict[str, int]:
    """The inode of the user namespace that owns each of a process's namespaces, see ioctl_ns(2)."""
    found = {}
    for kind in ("mnt", "net", "uts", "ipc", "pid", "cgroup"):
        fd = os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            owner = fcntl.ioctl(fd, _NS_GET_USERNS)
            try:
                found[kind] = os.fstat(owner).st_ino
            finally:
                os.close(owner)
        finally:
            os.close(fd)
    return found


def user_limits(pid: int) -> dict[str, int]:
    """The limits in /proc/sys/user, which the kernel shows for the user namespace of whoever reads them."""
    fd = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    own = os.fstat(fd).st_ino == os.stat("/proc/self/ns/user").st_ino
    read_end, write_end = os.pipe()

    def action() -> None:
        if not own:
            # Its capabilities end with the namespace it leaves; reading these files needs none.
            sys.setns(fd, sys.CLONE_NEWUSER)
        lines = []
        for name in sorted(os.listdir("/proc/sys/user")):
            with open(f"/proc/sys/user/{name}", encoding="ascii") as file:
                lines.append(f"{name} {file.read()}")
        os.write(write_end, "".join(lines).encode())

    try:
        in_child(action, "reading the limits of its user namespace")
        text = os.read(read_end, 65536).decode()
    finally:
        for end in (fd, read_end, write_end):
            os.close(end)
    return {line.split()[0]: int(line.split()[1]) for line in text.splitlines()}


class Fetch:
    """One request to the app's port, from within its network namespace, answered in its own time.

    The child that asks is in the dyno's network namespace only, not in its process or mount namespaces: the app can
    neither see nor trace it. It ends by itself after ``timeout_s``, however slowly the app answers; the caller polls
    ``fileno`` and is never held up.
    """

    MOST = 65536

    def __init__(self, pid: int, port: int, request: bytes, *, timeout_s: int) -> None:
        namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._fd, write_end = os.pipe()
        self._answer = b""
        self._child = os.fork()
        if self._child == 0:  # pragma: no cover - the child never returns
            try:
                sys.become_child()
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(timeout_s)
                sys.setns(namespace, sys.CLONE_NEWNET)
                _ask(port, request, write_end)
            finally:
                os._exit(1)
        os.close(namespace)
        os.close(write_end)
        os.set_blocking(self._fd, False)

    def fileno(self) -> int:
        return self._fd

    def read(self) -> bytes | None:
        """Takes in what has come; the whole answer (perhaps empty) once it has ended, else None."""
        try:
            piece = os.read(self._fd, self.MOST)
        except BlockingIOError:
            return None
        self._answer += piece
        return None if piece and len(self._answer) < self.MOST else self._answer

    def close(self) -> None:
        os.close(self._fd)
        os.kill(self._child, signal.SIGKILL)
        os.waitpid(self._child, 0)


def _ask(port: int, request: bytes, out: int) -> None:
    import socket  # only this one-shot request needs it

    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(request)
        while piece := connection.recv(65536):
            os.write(out, piece)
