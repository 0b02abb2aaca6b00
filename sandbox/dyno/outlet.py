"""Where a dyno's output goes: our own stdout or stderr, without ever blocking the loop that enforces limits."""

from __future__ import annotations

import os
import select
import stat

# poll(2) promises room for this much in a pipe that is writable (PIPE_BUF, pipe(7)); more could block.
_ATOMIC = 4096
_PIECE = 1 << 18
# Above this the app waits: its output is not read until ours moves.
HIGH_WATER = 1 << 20


class Outlet:
    """A buffered descriptor. ``closed`` once nobody takes what is written."""

    def __init__(self, fd: int) -> None:
        self.closed = False
        self._buffer = bytearray()
        self._regular = stat.S_ISREG(os.fstat(fd).st_mode)
        self.fd, self._non_blocking = fd, False
        if not self._regular:
            try:
                # An open file of our own, so that O_NONBLOCK does not reach whoever shares the caller's. A terminal
                # that says "writable" may still block a large write; this one cannot.
                self.fd = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
                self._non_blocking = True
            except OSError:
                self.fd = fd  # a socket: poll, and write little at a time

    @property
    def pending(self) -> int:
        return len(self._buffer)

    def write(self, data: bytes) -> None:
        if not self.closed:
            self._buffer += data

    def abandon(self) -> int:
        """Gives up on its reader; how many bytes were not delivered."""
        left = len(self._buffer)
        self.closed = True
        self._buffer.clear()
        return left

    def flush(self) -> None:
        """Writes what fits now."""
        view = memoryview(self._buffer)
        piece = _PIECE if self._regular or self._non_blocking else _ATOMIC
        done = 0
        try:
            while done < len(view):
                if not self._regular and not self._non_blocking and not _writable(self.fd):
                    break
                done += os.write(self.fd, view[done : done + piece])
        except BlockingIOError:
            pass  # the rest later
        except OSError:
            self.closed = True
        finally:
            view.release()
        if self.closed:
            self._buffer.clear()
        else:
            del self._buffer[:done]


def _writable(fd: int) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLOUT)
    return bool(poller.poll(0))
