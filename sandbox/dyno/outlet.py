"""Where a dyno's output goes: our own stdout or stderr, without ever blocking the loop that enforces limits."""

from __future__ import annotations

import os
import select
import stat

# poll(2) promises room for this much in a pipe that is writable (PIPE_BUF, pipe(7)); more could block.
_ATOMIC = 4096
# Above this the app waits: its output is not read until ours moves.
HIGH_WATER = 1 << 20


class Outlet:
    """A buffered descriptor. ``closed`` once its reader has gone away."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.closed = False
        self._buffer = bytearray()
        self._regular = stat.S_ISREG(os.fstat(fd).st_mode)

    @property
    def pending(self) -> int:
        return len(self._buffer)

    def write(self, data: bytes) -> None:
        if not self.closed:
            self._buffer += data

    def flush(self) -> None:
        """Writes what fits now."""
        view = memoryview(self._buffer)
        done = 0
        try:
            while done < len(view):
                if not self._regular and not _writable(self.fd, 0):
                    break
                done += os.write(self.fd, view[done : done + (1 << 20 if self._regular else _ATOMIC)])
        except OSError:
            self.closed = True
        finally:
            view.release()
        if self.closed:
            self._buffer.clear()
        else:
            del self._buffer[:done]

    def drain(self, deadline_s: float) -> None:
        """Writes all that is left, waiting for a slow reader up to the deadline."""
        while self._buffer and not self.closed and _writable(self.fd, deadline_s):
            self.flush()


def _writable(fd: int, timeout_s: float) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLOUT)
    return bool(poller.poll(timeout_s * 1000))
