"""How a run speaks: Heroku's lines, raw bytes, or a terminal."""

from __future__ import annotations

from sandbox.dyno.logs import Framer, line
from sandbox.dyno.outlet import Outlet
from sandbox.engine.base import Stream


class LineVoice:
    """Every line of the app and every event of the dyno on stdout, in Heroku's format."""

    def __init__(self, process: str) -> None:
        self._process, self._framer = process, Framer(process)
        self._out = Outlet(1)
        self.outlets = [self._out]

    def output(self, stream: Stream, data: bytes) -> None:
        self._out.write(self._framer.feed(stream, data))

    def event(self, message: str) -> None:
        self._out.write(line("heroku", self._process, message))

    warning = event

    def notice(self, part: str, message: str) -> None:
        self._out.write(line("sandbox", part, message))

    def finish(self) -> None:
        self._out.write(self._framer.flush())


class RawVoice:
    """The app's bytes as they are, stdout and stderr apart; warnings on stderr, events nowhere."""

    def __init__(self, process: str) -> None:
        self._process = process
        self._out, self._err = Outlet(1), Outlet(2)
        self.outlets = [self._out, self._err]

    def output(self, stream: Stream, data: bytes) -> None:
        (self._out if stream is Stream.STDOUT else self._err).write(data)

    def event(self, message: str) -> None:
        return

    def warning(self, message: str) -> None:
        self._err.write(line("heroku", self._process, message))

    def notice(self, part: str, message: str) -> None:
        self._err.write(line("sandbox", part, message))

    def finish(self) -> None:
        """Nothing is held back here."""


class QuietVoice(RawVoice):
    """With --json the document is the only thing on stdout: the app's output goes to stderr, as lines."""

    def __init__(self, process: str) -> None:
        super().__init__(process)
        self._framer = Framer(process)
        self.outlets = [self._err]

    def output(self, stream: Stream, data: bytes) -> None:
        self._err.write(self._framer.feed(stream, data))

    def finish(self) -> None:
        self._err.write(self._framer.flush())
