"""Heroku's line format: ``2026-01-02T03:04:05.678901+00:00 app[web.1]: message``.

An app's bytes are hostile: control characters are escaped, so that they cannot move a cursor, retitle a terminal or
fake another line's prefix. Every physical line carries its own prefix.
"""

from __future__ import annotations

import time

from sandbox.engine.base import Stream
from sandbox.units import escape

# Logplex splits longer lines (Heroku documentation, "Log format").
MAX_LINE_BYTES = 10_000


def timestamp(now_ns: int | None = None) -> str:
    """RFC 3339 in UTC with microseconds, as Heroku prints it."""
    seconds, rest = divmod(time.time_ns() if now_ns is None else now_ns, 1_000_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{rest // 1000:06d}+00:00"


def line(source: str, process: str, message: str, now_ns: int | None = None) -> bytes:
    """One line of ours; ``source``: ``heroku`` for the dyno's life, ``app`` for the app."""
    return f"{timestamp(now_ns)} {source}[{process}]: {escape(message)}\n".encode()


class Framer:
    """Cuts an app's output into lines, one framer per dyno; stdout and stderr do not tear each other's lines."""

    def __init__(self, process: str) -> None:
        self._process = process
        self._partial = {Stream.STDOUT: b"", Stream.STDERR: b""}

    def feed(self, stream: Stream, data: bytes, now_ns: int | None = None) -> bytes:
        """The finished lines that ``data`` completes, formatted; keeps at most one unfinished line per stream."""
        lines = (self._partial[stream] + data).split(b"\n")
        rest = lines.pop()
        while len(rest) >= MAX_LINE_BYTES:
            lines.append(rest[:MAX_LINE_BYTES])
            rest = rest[MAX_LINE_BYTES:]
        self._partial[stream] = rest
        return self._format(lines, now_ns) if lines else b""

    def flush(self, now_ns: int | None = None) -> bytes:
        """What was left without a newline when the output ended."""
        lines = [text for text in self._partial.values() if text]
        self._partial = dict.fromkeys(self._partial, b"")
        return self._format(lines, now_ns) if lines else b""

    def _format(self, lines: list[bytes], now_ns: int | None) -> bytes:
        prefix = f"{timestamp(now_ns)} app[{self._process}]: "
        out = []
        for text in lines:
            body = text.removesuffix(b"\r")
            for start in range(0, len(body) or 1, MAX_LINE_BYTES):
                piece = body[start : start + MAX_LINE_BYTES].decode("utf-8", "backslashreplace")
                out.append(prefix + escape(piece))
        out.append("")
        return "\n".join(out).encode()
