"""Reads the system-call filters of a running thread out of the kernel, byte by byte.

PTRACE_SEIZE and PTRACE_INTERRUPT stop the thread without a signal that it could see; PTRACE_SECCOMP_GET_FILTER
(Linux 4.4) then copies the classic BPF programs. The stop takes about 0.3 ms. A call that waits is restarted by the
kernel, but a few (epoll_wait) return EINTR: so this is done to a dyno's init only, which waits for children and
nothing else. Everything else in the dyno inherits init's filters and can only add to them.
"""

from __future__ import annotations

import ctypes
import errno
import os
import time
from typing import NamedTuple

from sandbox.errors import HostError

_SEIZE, _INTERRUPT, _DETACH, _GET_FILTER = 0x4206, 0x4207, 17, 0x420C
_WALL = 0x40000000
_STOP_S = 2.0  # an emulated processor takes 20 ms
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long] * 4


class Filters(NamedTuple):
    """``programs``: struct sock_filter[] each, newest first. ``stopped_ms``: how long the thread stood still."""

    programs: tuple[bytes, ...]
    stopped_ms: float


def read(tid: int) -> Filters:
    """The filters of one thread. HostError when the kernel does not give them: then nothing is known about them."""
    _ptrace(_SEIZE, tid, 0, 0)
    begin = time.monotonic()
    try:
        _ptrace(_INTERRUPT, tid, 0, 0)
        deadline = begin + _STOP_S
        while not os.waitpid(tid, _WALL | os.WNOHANG)[0]:
            if time.monotonic() > deadline:
                # Traced by us until we end; it stops once it is thawed, and the kernel lets it go with us.
                raise HostError(f"thread {tid} does not stop: its cgroup is frozen, or it hangs in the kernel.")
        programs: list[bytes] = []
        while True:
            count = _libc.ptrace(_GET_FILTER, tid, len(programs), 0)
            if count < 0:
                break
            buffer = ctypes.create_string_buffer(8 * count)
            if _libc.ptrace(_GET_FILTER, tid, len(programs), ctypes.addressof(buffer)) != count:
                raise HostError(f"filter {len(programs)} of thread {tid} changed while it was read.")
            programs.append(buffer.raw)
        # ENOENT: past the last one. EINVAL: the thread is not under seccomp at all.
        code = ctypes.get_errno()
        if code not in (errno.ENOENT, errno.EINVAL):
            raise HostError(f"the filters of thread {tid} cannot be read: {os.strerror(code)}.")
    finally:
        _libc.ptrace(_DETACH, tid, 0, 0)
    return Filters(tuple(programs), round((time.monotonic() - begin) * 1000, 3))


def _ptrace(request: int, tid: int, address: int, data: int) -> None:
    if _libc.ptrace(request, tid, address, data) != 0:
        code = ctypes.get_errno()
        raise HostError(f"thread {tid} cannot be examined: {os.strerror(code)}.", hint="is a debugger attached to it?")
