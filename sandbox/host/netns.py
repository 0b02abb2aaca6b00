"""Network namespaces: made, entered by one thread, kept by a mount."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from sandbox.errors import HostError
from sandbox.host import syscalls as sys


def make(path: str) -> None:
    """A new network namespace, kept by a bind mount at ``path``; loopback in it is still down."""
    fd = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.close(fd)
    ready_r, ready_w = os.pipe()
    done_r, done_w = os.pipe()
    pid = os.fork()
    if pid == 0:  # pragma: no cover - the child never returns
        try:
            sys.become_child()
            os.close(done_w)
            sys.unshare(sys.CLONE_NEWNET)
            os.write(ready_w, b"+")
            os.read(done_r, 1)
        finally:
            os._exit(0)
    os.close(ready_w)
    os.close(done_r)
    try:
        if os.read(ready_r, 1) != b"+":
            raise HostError("the kernel makes no network namespace.", hint="sandbox doctor")
        sys.mount(f"/proc/{pid}/ns/net", path, "", sys.MS_BIND)
    finally:
        os.close(ready_r)
        os.close(done_w)
        os.waitpid(pid, 0)


@contextmanager
def entered(fd: int) -> Iterator[None]:
    """The calling thread is in that network namespace; other threads stay where they are."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        sys.setns(fd, sys.CLONE_NEWNET)
        try:
            yield
        finally:
            sys.setns(home, sys.CLONE_NEWNET)
    finally:
        os.close(home)


def write_sysctl(name: str, value: str) -> None:
    """A network sysctl of the calling thread's namespace: /proc/sys/net shows that of whoever opens it."""
    with open(f"/proc/sys/net/{name}", "w", encoding="ascii") as file:
        file.write(value)


def read_sysctl(name: str) -> str:
    with open(f"/proc/sys/net/{name}", encoding="ascii") as file:
        return file.read().strip()
