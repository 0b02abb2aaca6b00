"""What we are doing, on stderr, while something takes long."""

from __future__ import annotations

import os
import sys
import threading
import time

from sandbox.units import escape


class Progress:
    """One line a step. On a terminal the current line counts its seconds; elsewhere lines are plain and final."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._animated = not quiet and os.isatty(2) and os.environ.get("TERM", "dumb") != "dumb"
        self._message = ""
        self._since = 0.0
        self._stop = threading.Event()
        self._ticker: threading.Thread | None = None

    def __call__(self, message: str) -> None:
        """Says what begins now; what was said before is done."""
        if self._quiet:
            return
        self.close()
        self._message, self._since = escape(message), time.monotonic()
        if not self._animated:
            _write(f"-----> {self._message}\n")
            return
        self._show()
        self._stop.clear()
        self._ticker = threading.Thread(target=self._tick, daemon=True)
        self._ticker.start()

    def close(self) -> None:
        """Ends the current line; from here on stderr belongs to somebody else."""
        if self._ticker is not None:
            self._stop.set()
            self._ticker.join()
            self._ticker = None
            self._show()
            _write("\n")

    def _tick(self) -> None:
        while not self._stop.wait(1.0):
            self._show()

    def _show(self) -> None:
        seconds = time.monotonic() - self._since
        counted = f" ({seconds:.0f} s)" if seconds >= 1 else ""
        # Erase the line, then write it anew; cut to the terminal, or a long line would scroll at each second.
        columns = os.get_terminal_size(2).columns or 80
        _write("\r\x1b[K" + f"-----> {self._message}{counted}"[: max(20, columns - 1)])


def _write(text: str) -> None:
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        return  # nobody reads it
