"""What we are doing, on stderr, while something takes long."""

from __future__ import annotations

import os
import sys
import time

from sandbox.units import escape


class Progress:
    """Long work on stderr: one line that is rewritten on a terminal, plain lines elsewhere."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._animated = os.isatty(2) and os.environ.get("TERM") != "dumb"
        self._since = time.monotonic()

    def __call__(self, message: str) -> None:
        if self._quiet:
            return
        elapsed = time.monotonic() - self._since
        sys.stderr.write(f"-----> {escape(message)}" + (f" ({elapsed:.0f} s)" if elapsed >= 1 else "") + "\n")
        sys.stderr.flush()
