"""The input side of an attachment, the same for every engine: a non-blocking socket whose peer may be gone."""

from __future__ import annotations

import socket


def send(connection: socket.socket, data: bytes) -> int:
    """Passes on what fits now; how many bytes were taken. Without a reader all of it is: nobody is left to want it."""
    try:
        return connection.send(data)
    except BlockingIOError:
        return 0
    except OSError:
        return len(data)


def end_input(connection: socket.socket) -> None:
    """Tells the peer that no more input comes."""
    try:
        connection.shutdown(socket.SHUT_WR)
    except OSError:
        return
