"""From the open gate to the end: output, input, limits, signals and deadlines of one running dyno, in one loop."""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from sandbox.dyno.exits import Facts
from sandbox.dyno.outlet import HIGH_WATER, Outlet
from sandbox.engine.base import Attachment, Container, Engine, Stream
from sandbox.errors import HostError
from sandbox.host import observe
from sandbox.host.cgroup import Cgroup, Usage
from sandbox.host.inside import Fetch
from sandbox.host.oom import KernelLog
from sandbox.policy.policy import Policy
from sandbox.units import MIB

# Heroku samples memory every ~20 s and gives a web process 60 s to bind $PORT.
SAMPLE_S = 20.0
BOOT_TIMEOUT_S = 60.0
GRACE_S = 30.0
_TICK_S = 1.0
_BOOT_POLL_S = 0.05


class Voice(Protocol):
    """Who tells the user: the app's output and the dyno's events, in the chosen format."""

    def output(self, stream: Stream, data: bytes) -> None: ...

    def event(self, message: str) -> None: ...

    def warning(self, message: str) -> None: ...

    def notice(self, part: str, message: str) -> None:
        """A line of ours about the dyno: ``sandbox[PART]: MESSAGE``."""

    def finish(self) -> None: ...

    @property
    def outlets(self) -> list[Outlet]: ...


class Wishes(NamedTuple):
    """How this run is to be watched; seconds. ``port``: of a web process, else 0."""

    timeout_s: float | None = None
    grace_s: float = GRACE_S
    sample_s: float = SAMPLE_S
    boot_timeout_s: float = BOOT_TIMEOUT_S
    port: int = 0
    stdin_fd: int = -1
    tty_fd: int = -1


@dataclass(slots=True)
class Result:
    """What the loop saw. ``usage``: the highest figures, read before the cgroup went away."""

    facts: Facts = field(default_factory=lambda: Facts(status=None))
    usage: Usage = field(default_factory=Usage)
    up_after_s: float | None = None
    answered: bool = False
    over_quota_samples: int = 0
    pids_limit_reached: bool = False
    undelivered_bytes: int = 0


class Watch:
    """The loop. ``signals``: a descriptor from which signal numbers come, one byte each."""

    def __init__(
        self,
        *,
        engine: Engine,
        container: Container,
        attachment: Attachment,
        cgroup: Cgroup,
        totals: Cgroup,
        policy: Policy,
        wishes: Wishes,
        voice: Voice,
        kernel_log: KernelLog,
        signals: int,
        on_up: Callable[[], Fetch | None] = lambda: None,
        on_answer: Callable[[bytes], None] = lambda _: None,
        notices: socket.socket | None = None,
    ) -> None:
        self._engine, self._container, self._attachment = engine, container, attachment
        self._cgroup, self._totals, self._policy = cgroup, totals, policy
        self._wishes, self._voice, self._log, self._signals = wishes, voice, kernel_log, signals
        self._on_up, self._on_answer = on_up, on_answer
        self._fetch: Fetch | None = None
        self._notices = notices
        self._begin = time.monotonic()
        self._result = Result()
        self._facts = self._result.facts
        self._input = b""
        self._input_open = wishes.stdin_fd >= 0
        self._input_ended = False
        self._output_ended = False
        self._deadlines: dict[str, float] = {"tick": self._begin + _TICK_S, "sample": self._begin + wishes.sample_s}
        if wishes.timeout_s is not None:
            self._deadlines["timeout"] = self._begin + wishes.timeout_s
        if wishes.port:
            self._deadlines |= {"boot": self._begin + _BOOT_POLL_S, "boot-limit": self._begin + wishes.boot_timeout_s}

    def run(self) -> Result:
        """Returns when the dyno has ended and its output is out."""
        gc.enable()  # off since the program's first line; a dyno may live for days
        try:
            pidfd = os.pidfd_open(self._container.pid)
        except ProcessLookupError:
            pidfd = -1
        oom = self._cgroup.oom_event()
        try:
            while pidfd >= 0 and not self._step(pidfd, -1 if oom is None else oom):
                pass
            self._end()
        finally:
            if self._fetch is not None:
                self._fetch.close()
            for fd in (pidfd, oom):
                if fd is not None and fd >= 0:
                    os.close(fd)
        self._result.facts = self._facts
        return self._result

    def _step(self, pidfd: int, oom: int) -> bool:
        """One round: waits for the next thing to happen and handles it; whether init has ended."""
        poller = select.poll()
        for fd in (pidfd, self._signals, oom):
            if fd >= 0:
                poller.register(fd, select.POLLIN)
        full = False
        for outlet in self._voice.outlets:
            outlet.flush()
            if outlet.pending:
                poller.register(outlet.fd, select.POLLOUT)
                full = full or outlet.pending > HIGH_WATER
            if outlet.closed and not self._facts.output_closed:
                self._facts = self._facts._replace(output_closed=True)
                self._stop("SIGTERM")
        attachment = self._attachment.fileno()
        if not self._output_ended and not full:
            poller.register(attachment, select.POLLIN | (select.POLLOUT if self._input else 0))
        if self._input_open and len(self._input) < 65536:
            poller.register(self._wishes.stdin_fd, select.POLLIN)
        if self._fetch is not None:
            poller.register(self._fetch, select.POLLIN)
        if self._notices is not None and not full:
            poller.register(self._notices, select.POLLIN)
        wait = max(0.0, min(self._deadlines.values()) - time.monotonic())
        ready = dict(poller.poll(wait * 1000 + 1))
        if self._signals in ready:
            self._on_signals()
        if attachment in ready:
            self._read_output()
            self._feed_input()
        if self._wishes.stdin_fd in ready and self._input_open:
            self._read_input()
        if oom >= 0 and oom in ready:
            os.read(oom, 4096)
            self._check_oom()
        if self._notices is not None and self._notices.fileno() in ready:
            self._tell_notices()
        self._read_answer()
        self._on_deadlines()
        return pidfd in ready

    def _tell_notices(self) -> None:
        """What the firewall denied this dyno, as it happens."""
        assert self._notices is not None  # noqa: S101 - only called when it is there
        try:
            self._voice.notice("firewall", self._notices.recv(512).decode("utf-8", "replace"))
        except BlockingIOError:
            return

    def _read_output(self) -> None:
        chunks = self._attachment.receive()
        if chunks is None:
            self._output_ended = True
            return
        for stream, data in chunks:
            self._voice.output(stream, data)

    def _read_input(self) -> None:
        try:
            data = os.read(self._wishes.stdin_fd, 65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""  # a terminal that hung up
        if data:
            self._input += data
        else:
            self._input_open = False
        self._feed_input()

    def _feed_input(self) -> None:
        if self._input:
            self._input = self._input[self._attachment.send(self._input) :]
        if not self._input and not self._input_open and not self._input_ended and self._wishes.stdin_fd >= 0:
            self._input_ended = True
            self._attachment.end_input()

    def _on_signals(self) -> None:
        for number in os.read(self._signals, 64):
            if number == signal.SIGWINCH:
                self._resize()
            elif self._facts.stopped:
                self._voice.event("Stopping remaining processes with SIGKILL")
                self._cgroup.kill()
            else:
                self._facts = self._facts._replace(stopped=True)
                self._stop("SIGTERM")

    def _resize(self) -> None:
        if self._wishes.tty_fd >= 0:
            try:
                size = os.get_terminal_size(self._wishes.tty_fd)
            except OSError:
                return  # the terminal hung up
            self._attachment.resize(size.lines, size.columns)

    def _stop(self, name: str) -> None:
        """SIGTERM to every process, then the grace time."""
        if "grace" in self._deadlines:
            return
        self._voice.event(f"Stopping all processes with {name}")
        # Not to our init: it would pass it on, and its child would get a second one in the middle of its first.
        if not self._engine.signals_itself(self._container, signal.SIGTERM):
            self._cgroup.signal(signal.SIGTERM, but=self._container.pid)
        self._deadlines["grace"] = time.monotonic() + self._wishes.grace_s
        for deadline in ("timeout", "boot", "boot-limit"):
            self._deadlines.pop(deadline, None)

    def _kill(self) -> None:
        self._voice.event("Stopping process with SIGKILL")
        self._cgroup.kill()

    def _on_deadlines(self) -> None:
        now = time.monotonic()
        for name in [name for name, at in self._deadlines.items() if at <= now]:
            match name:
                case "tick":
                    self._deadlines[name] = now + _TICK_S
                    self._sample_usage()
                    self._check_shim()
                case "sample":
                    self._deadlines[name] = now + self._wishes.sample_s
                    self._check_quota()
                case "timeout":
                    self._facts = self._facts._replace(timed_out_s=self._wishes.timeout_s)
                    self._stop("SIGTERM")
                case "boot":
                    self._check_boot(now)
                case "boot-limit":
                    self._boot_failed()
                case "grace":
                    del self._deadlines[name]
                    self._grace_over()

    def _grace_over(self) -> None:
        grace = self._wishes.grace_s
        self._facts = self._facts._replace(killed_after_grace_s=grace)
        self._voice.warning(
            f"Error R12 (Exit timeout) -> At least one process failed to exit within {grace:g} seconds of SIGTERM"
        )
        self._voice.event("Stopping remaining processes with SIGKILL")
        self._cgroup.kill()

    def _check_boot(self, now: float) -> None:
        self._deadlines["boot"] = now + _BOOT_POLL_S
        try:
            if not observe.listens(self._container.pid, self._wishes.port):
                return
        except HostError:
            return  # it ended; the loop sees that next
        for name in ("boot", "boot-limit"):
            self._deadlines.pop(name, None)
        self._result.up_after_s = now - self._begin
        self._voice.event("State changed from starting to up")
        try:
            self._fetch = self._on_up()
        except OSError:
            return  # it ended; the loop sees that next

    def _read_answer(self) -> None:
        if self._fetch is None or (answer := self._fetch.read()) is None:
            return
        self._fetch.close()
        self._fetch = None
        self._result.answered = bool(answer)
        self._on_answer(answer)
        self._facts = self._facts._replace(stopped=True)
        self._stop("SIGTERM")

    def _boot_failed(self) -> None:
        limit = self._wishes.boot_timeout_s
        self._facts = self._facts._replace(boot_timeout_s=limit)
        self._voice.warning(
            f"Error R10 (Boot timeout) -> Web process failed to bind to $PORT within {limit:g} seconds of launch"
        )
        self._deadlines.pop("boot", None)
        self._deadlines.pop("boot-limit", None)
        self._kill()

    def _sample_usage(self) -> Usage:
        before = self._result.usage
        now = before
        # Docker removes the container's cgroup at its end; its parent, which is ours, still has the peaks.
        for group in (self._cgroup, self._totals):
            now = _highest(now, group.usage() if group.exists() else Usage())
        limit = self._policy.pids_max
        # RLIMIT_NPROC has the same value and refuses first, uncounted; the peak tells that the limit was reached.
        if now.pids_refused > before.pids_refused or max(before.pids, before.pids_peak) < limit <= max(
            now.pids, now.pids_peak
        ):
            self._result.pids_limit_reached = True
            self._voice.warning(
                f"Error (Process limit reached) -> {limit} of {limit} processes and threads; a further one gets EAGAIN"
            )
        self._result.usage = now
        return now

    def _check_shim(self) -> None:
        """Output that ended while init lives: the app closed it, or whoever held it is gone. Then nobody could
        tell how the dyno ends, and it must not live on unwatched.
        """
        if self._output_ended and self._engine.lost(self._container) and observe.alive(self._container.pid):
            self._voice.warning("Error R99 (Platform error) -> the process that held this dyno was lost")
            self._kill()

    def _check_quota(self) -> None:
        now = self._cgroup.usage() if self._cgroup.exists() else Usage()
        total, quota = now.memory_bytes + now.swap_bytes, self._policy.memory_quota_bytes
        if total > quota:
            self._result.over_quota_samples += 1
            self._voice.warning(f"Process running mem={total // MIB}M({total * 100 / quota:.1f}%)")
            self._voice.warning("Error R14 (Memory quota exceeded)")

    def _check_oom(self) -> None:
        """The kernel killed for memory: at the kill limit the whole dyno goes, as at Heroku."""
        usage = self._sample_usage()
        victims = self._victims()
        if (usage.oom_kills or victims) and not self._facts.oom:
            self._facts = self._facts._replace(oom=True, oom_task=", ".join(victims[:3]))
            limit = self._policy.memory_kill_bytes
            percent = limit * 100 / self._policy.memory_quota_bytes
            self._voice.warning(f"Process running mem={limit // MIB}M({percent:.1f}%)")
            self._voice.warning("Error R15 (Memory quota vastly exceeded)")
            self._kill()

    def _victims(self) -> list[str]:
        key = "" if self._cgroup.is_v2 else "memory"
        path = self._totals.paths.get(key, "")
        # The kernel's log names the cgroup by its path below the hierarchy's mount point. Under systemd it is a slice,
        # whose name has no dashes of ours.
        return self._log.victims(path[path.rindex("/sbx") :]) if "/sbx" in path else []

    def _end(self) -> None:
        """Init is gone and the kernel has ended all it had: the rest of the output, the figures, the status."""
        quiet_since = time.monotonic()
        while not self._output_ended and time.monotonic() - quiet_since < 5.0:
            self._deliver(HIGH_WATER)
            if select.select([self._attachment], [], [], 0.1)[0]:
                self._read_output()
                quiet_since = time.monotonic()
        self._check_oom()
        self._sample_usage()
        self._facts = self._facts._replace(status=self._engine.exit_status(self._container, timeout_s=5.0))
        self._voice.finish()
        self._deliver(0)
        if not self._cgroup.kill():
            raise HostError("processes of the dyno do not end.", hint="sandbox gc")

    def _deliver(self, most: int) -> None:
        """Waits for a slow reader until at most ``most`` bytes are undelivered; a signal gives up on the rest."""
        while any(outlet.pending > most for outlet in self._voice.outlets):
            poller = select.poll()
            poller.register(self._signals, select.POLLIN)
            for outlet in self._voice.outlets:
                outlet.flush()
                if outlet.pending > most:
                    poller.register(outlet.fd, select.POLLOUT)
            ready = dict(poller.poll(100))
            if self._signals in ready and set(os.read(self._signals, 64)) - {signal.SIGWINCH}:
                self._result.undelivered_bytes = sum(outlet.abandon() for outlet in self._voice.outlets)


def _highest(one: Usage, other: Usage) -> Usage:
    return Usage(*(max(getattr(one, name), getattr(other, name)) for name in Usage._fields))
