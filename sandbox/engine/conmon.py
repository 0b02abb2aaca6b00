"""conmon's side of a container: its attach socket, and the pipe that resizes a terminal."""

from __future__ import annotations

import os
import socket

from sandbox.engine import wire
from sandbox.engine.base import Chunk, Stream
from sandbox.errors import EngineError

# conmon's stream numbers (its src/utils.h: STDIN_PIPE, STDOUT_PIPE, STDERR_PIPE are 1, 2, 3).
_STREAMS = {2: Stream.STDOUT, 3: Stream.STDERR}
_PACKET = 65536


class ConmonAttachment:
    """conmon's attach socket: sequenced packets whose first byte names the stream."""

    def __init__(self, bundle: str) -> None:
        self._bundle = bundle
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # A Unix socket's address ends at 108 bytes; the folder's descriptor makes it short.
        folder = os.open(bundle, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._socket.connect(f"/proc/self/fd/{folder}/attach")
        except OSError as error:
            raise EngineError(f"conmon's attach socket cannot be reached: {error.strerror}.") from error
        finally:
            os.close(folder)
        self._socket.setblocking(False)

    def fileno(self) -> int:
        return self._socket.fileno()

    def receive(self) -> list[Chunk] | None:
        chunks: list[Chunk] = []
        for _ in range(32):
            try:
                packet = self._socket.recv(_PACKET)
            except BlockingIOError:
                return chunks
            except OSError:
                packet = b""
            if not packet:
                return chunks or None
            stream = _STREAMS.get(packet[0])
            if stream is not None:
                chunks.append((stream, packet[1:]))
        return chunks

    def send(self, data: bytes) -> int:
        return wire.send(self._socket, data[:8192])

    def end_input(self) -> None:
        wire.end_input(self._socket)

    def resize(self, rows: int, columns: int) -> None:
        # conmon's control pipe takes "1 rows columns" (its src/ctrl.c, WIN_RESIZE_EVENT).
        try:
            fd = os.open(f"{self._bundle}/ctl", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return
        try:
            os.write(fd, f"1 {rows} {columns}\n".encode())
        finally:
            os.close(fd)

    def close(self) -> None:
        self._socket.close()
