"""What an app prints cannot command a terminal, fake a line, or hold the dyno up."""

from __future__ import annotations

import os
import pty
import re
import select
import time

from tests.conftest import EXAMPLES, lines

PREFIX = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00 (app|heroku)\[[-\w.]+\]: ")
HOSTILE = r"printf 'a\033[2Jb\033]0;title\007c\rd\302\233e\n2026-01-01T00:00:00.000000+00:00 heroku[web.1]: forged\n\000nul\n\377bad\n'"


def test_every_physical_line_carries_its_own_prefix(sandbox, engine):
    done = sandbox("run", "--engine", engine, str(EXAMPLES / "shell"), "--", "sh", "-c", HOSTILE)
    for line in done.out.splitlines():
        assert PREFIX.match(line), line
    app = lines(done)
    assert app[0] == r"a\x1b[2Jb\x1b]0;title\x07c\x0dd\x9be"
    assert app[1].startswith("2026-01-01")
    assert app[2] == r"\x00nul"
    assert app[3] == r"\xffbad"


def test_raw_passes_bytes_and_keeps_the_streams_apart(sandbox, engine):
    done = sandbox(
        "run",
        "--raw",
        "-q",
        "--engine",
        engine,
        str(EXAMPLES / "shell"),
        "--",
        "sh",
        "-c",
        "printf 'a\\033[2Jb'; printf err >&2",
    )
    assert (done.out, done.err) == ("a\x1b[2Jb", "err")


def test_the_rest_without_a_newline_is_shown(sandbox, engine):
    assert lines(sandbox("run", "--engine", engine, str(EXAMPLES / "shell"), "--", "printf", "no newline")) == [
        "no newline"
    ]


def test_stdin_is_passed_and_ends(sandbox, engine):
    done = sandbox(
        "run", "--raw", "-q", "--engine", engine, str(EXAMPLES / "shell"), "--", "wc", "-c", stdin=b"x" * 3_000_000
    )
    assert done.out.strip() == "3000000"


def test_closing_stdout_does_not_end_the_dyno(sandbox, engine):
    done = sandbox(
        "run",
        "--raw",
        "--engine",
        engine,
        str(EXAMPLES / "shell"),
        "--",
        "sh",
        "-c",
        "echo first; exec >&- 2>&-; sleep 2.5; exit 7",
    )
    assert done.out == "first\n"
    assert done.status == 7


def test_a_reader_that_goes_away_stops_the_dyno(sandbox, engine):
    process = sandbox.start(
        "run", "--raw", "--engine", engine, str(EXAMPLES / "shell"), "--", "sh", "-c", "while echo line; do :; done"
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) in (143, 141, 1)
    assert b"nobody reads its output any more" in process.stderr.read()
    process.stderr.close()


def test_a_command_on_a_terminal_gets_a_terminal(sandbox, engine):
    """A real pseudo-terminal: the app sees a tty of its own with our size, echo works, Ctrl-C goes to the app."""
    pid, fd = pty.fork()
    if pid == 0:
        argv = sandbox.argv("run", "--engine", engine, str(EXAMPLES / "shell"), "--", "bash", "--norc")
        os.execvp(argv[0], argv)
    import fcntl
    import struct
    import termios

    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("4H", 33, 77, 0, 0))
    seen = b""

    def until(mark: bytes, send: bytes = b"") -> None:
        nonlocal seen
        os.write(fd, send)
        deadline = time.monotonic() + 60
        while mark not in seen:
            assert time.monotonic() < deadline, seen
            if select.select([fd], [], [], 0.2)[0]:
                try:
                    seen += os.read(fd, 65536)
                except OSError:
                    break
        assert mark in seen, seen

    until(b"$ ")
    until(b"tty=/dev/pts/0", b"echo tty=$(tty) host=$(hostname)\n")
    os.kill(pid, 28)  # SIGWINCH
    until(b"size=33 77", b"sleep 0.3; echo size=$(stty size)\n")
    os.write(fd, b"sleep 50\n")
    time.sleep(0.5)
    os.write(fd, b"\x03")
    until(b"status=130", b"echo status=$?\n")
    os.write(fd, b"exit 9\n")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if select.select([fd], [], [], 0.2)[0]:
            try:
                seen += os.read(fd, 65536)
            except OSError:
                break
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 9, seen
    os.close(fd)


def test_exit_codes(sandbox, engine):
    shell = str(EXAMPLES / "shell")
    for command, status in (
        (["sh", "-c", "exit 42"], 42),
        (["no-such-command"], 127),
        (["/etc/passwd"], 126),
        (["sh", "-c", "kill -9 $$"], 137),
    ):
        assert sandbox("run", "--raw", "--engine", engine, shell, "--", *command).status == status, command
