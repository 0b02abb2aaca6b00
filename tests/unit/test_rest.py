"""Units, names, log lines, exits, journal, leases, configuration, and promises about the program itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox import config, hostcmd, names, units
from sandbox.cli import entry
from sandbox.dyno import exits
from sandbox.dyno.exits import Facts, Reason
from sandbox.dyno.logs import MAX_LINE_BYTES, Framer, timestamp
from sandbox.engine.base import Stream
from sandbox.errors import HostError, UsageError
from sandbox.host import ids, journal
from sandbox.policy import policy, sizes
from sandbox.units import GIB, MIB

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("text", "value"), [("512M", 512 * MIB), ("1g", GIB), ("64MiB", 64 * MIB), ("2KB", 2048), ("100", 100)]
)
def test_sizes_in_bytes(text, value):
    assert units.parse_bytes(text, what="--memory") == value


@pytest.mark.parametrize("text", ["512X", "", "-1", "0", "0M", "1.5G", "M", "²", "１", "1e3", "12 34", "1T"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UsageError, match="--memory"):
        units.parse_bytes(text, what="--memory")


@pytest.mark.parametrize(
    ("text", "value"), [("30s", 30), ("1.5s", 1.5), ("200ms", 0.2), ("5m", 300), ("1h", 3600), ("7", 7)]
)
def test_durations(text, value):
    assert units.parse_duration(text, what="--timeout") == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "s", "-1s", "0", "1d", "nan", "inf", "1e9", "99999h"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(UsageError, match="--timeout"):
        units.parse_duration(text, what="--timeout")


@given(st.text())
def test_escaped_text_commands_no_terminal(text):
    shown = units.escape(text)
    assert all(c == "\t" or c.isprintable() for c in shown)
    assert units.show(text).isprintable()


def test_names():
    assert names.hostname("web.1") == "web-1"
    assert names.app_name("/x/My App_2") == "my-app-2"
    assert names.is_container_id(names.new_container_id("01234567"), "01234567")
    assert not names.is_container_id("sbx-01234567-89abcdef", "76543210")
    assert not names.is_container_id("sbx-01234567-../../..", "01234567")
    assert names.host_id("/a") != names.host_id("/b")


@given(st.lists(st.binary(max_size=50), max_size=20))
def test_a_framer_loses_and_invents_nothing(pieces):
    framer = Framer("web.1")
    out = b"".join(framer.feed(Stream.STDOUT, piece) for piece in pieces) + framer.flush()
    messages = [line.split("]: ", 1)[1] for line in out.decode().split("\n")[:-1]]
    text = b"".join(pieces)
    expected = text.split(b"\n")
    if expected[-1] == b"":
        expected.pop()
    assert messages == [units.escape(e.removesuffix(b"\r").decode("utf-8", "backslashreplace")) for e in expected]


def test_long_lines_are_cut_and_streams_do_not_tear_each_other():
    framer = Framer("web.1")
    assert framer.feed(Stream.STDOUT, b"half ") == b""
    assert framer.feed(Stream.STDERR, b"whole\n", 0).endswith(b"app[web.1]: whole\n")
    assert framer.feed(Stream.STDOUT, b"done\n", 0).endswith(b"app[web.1]: half done\n")
    assert framer.feed(Stream.STDOUT, b"x" * (2 * MAX_LINE_BYTES)).count(b"\n") == 2


def test_the_time_is_herokus():
    assert timestamp(1_767_323_045_678_901_000) == "2026-01-02T03:04:05.678901+00:00"


POLICY = policy.make(sizes.find("1x"), host_memory_bytes=GIB, swap=False)


@pytest.mark.parametrize(
    ("facts", "code", "reason", "words"),
    [
        (Facts(0), 0, Reason.EXITED, "exited with status 0"),
        (Facts(3), 3, Reason.EXITED, "exited with status 3"),
        (Facts(127), 127, Reason.EXITED, "not found"),
        (Facts(139), 139, Reason.SIGNAL, "SIGSEGV"),
        (Facts(137, oom=True, oom_task="pid 4, python3"), 137, Reason.OOM, "reached 1024 MiB, its quota is 512 MiB"),
        (Facts(0, oom=True), 137, Reason.OOM, "R15"),
        (Facts(143, timed_out_s=2.0), 124, Reason.TIMEOUT, "our timeout of 2 s"),
        (Facts(137, timed_out_s=2.0, killed_after_grace_s=1.0), 124, Reason.TIMEOUT, "still alive 1 s after SIGTERM"),
        (Facts(137, boot_timeout_s=60.0), 137, Reason.BOOT_TIMEOUT, "R10"),
        (Facts(None), 125, Reason.SHIM_LOST, "unknown"),
        (Facts(None, stopped=True), 125, Reason.SHIM_LOST, "unknown"),
        (Facts(143, stopped=True), 143, Reason.STOPPED, "SIGTERM"),
        (Facts(137, stopped=True, killed_after_grace_s=30.0), 137, Reason.EXIT_TIMEOUT, "R12"),
    ],
)
def test_why_a_dyno_ended(facts, code, reason, words):
    end = exits.describe(facts, POLICY)
    assert (end.code, end.reason) == (code, reason)
    assert words in end.message


def test_a_journal_belongs_to_its_living_owner(tmp_path):
    own = journal.Journal.start(str(tmp_path), "sbx-a", {"id": "sbx-a"})
    own.record("mount", "/x")
    assert journal.Journal.adopt(own.path) is None
    assert journal.is_live(own.path)
    own.close()
    adopted = journal.Journal.adopt(own.path)
    assert adopted.steps() == [{"op": "mount", "name": "/x"}]
    adopted.finish()
    assert journal.paths(str(tmp_path)) == []


def test_a_torn_last_line_was_not_taken(tmp_path):
    path = tmp_path / "sbx-a.jsonl"
    path.write_bytes(b'{"id":"sbx-a"}\n{"op":"mount","name":"/x"}\n{"op":"mou')
    assert journal.Journal.adopt(str(path)).steps() == [{"op": "mount", "name": "/x"}]


def test_uid_ranges_are_leased_once(tmp_path):
    folder = str(tmp_path / "leases")
    journals = []
    for number in range(3):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("")
        journals.append(str(path))
    first, second = (ids.lease(j, base=65536, slots=2, folder=folder) for j in journals[:2])
    assert {first, second} == {"65536", "131072"}
    with pytest.raises(HostError, match="all 2 uid ranges"):
        ids.lease(journals[2], base=65536, slots=2, folder=folder)
    ids.release(first, journals[1], folder=folder)  # not its own: stays
    with pytest.raises(HostError):
        ids.lease(journals[2], base=65536, slots=2, folder=folder)
    ids.release(first, journals[0], folder=folder)
    assert ids.lease(journals[2], base=65536, slots=2, folder=folder) == first
    os.unlink(journals[1])  # its dyno is gone without a word: the lease is stale
    assert ids.sweep(str(tmp_path), folder=folder) == [second]


def test_leases_are_not_taken_in_a_folder_that_others_can_write_to(tmp_path):
    folder = tmp_path / "leases"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(HostError, match="not a folder that only root can write to"):
        ids.lease("x", base=65536, slots=2, folder=str(folder))


def test_configuration_is_strict(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text('state_dir = "/s"\n')
    loaded = config.load(environ={"SANDBOX_RUN_DIR": "/r"}, file=str(file))
    assert (loaded.state_dir, loaded.run_dir) == ("/s", "/r")
    assert config.load(state_dir="/flag", environ={"SANDBOX_STATE_DIR": "/env"}, file=str(file)).state_dir == "/flag"
    for text, message in (
        ("nonsense = 1", "unknown key"),
        ("uid_base = 'x'", "must be of type int"),
        ("x = ", "config.toml"),
        ("uid_base = 5", "at least"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=message):
            config.load(environ={}, file=str(file))
    with pytest.raises(UsageError, match="absolute path"):
        config.load(state_dir="relative", environ={}, file="/nonexistent")


def sandbox(*arguments: str) -> subprocess.CompletedProcess:
    code = "import sys; sys.argv[0] = 'sandbox'; from sandbox.cli.entry import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )


def test_help_names_every_command_and_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['sandbox', '--help']; from sandbox.cli.entry import main; main(); "
        "print([m for m in ('click', 'docker', 'structlog', 'pydantic', 'starlette', 'jinja2', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"
    for command in entry.COMMANDS:
        assert command in done.stdout


def test_the_static_help_lists_every_option_of_the_group():
    from sandbox.cli.main import cli

    for parameter in cli.params:
        for option in parameter.opts:
            assert option in entry.HELP


@pytest.mark.parametrize("command", list(entry.COMMANDS))
def test_every_command_has_help(command):
    done = sandbox(command, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: sandbox")


@pytest.mark.parametrize("arguments", [["nonsense"], ["run"], ["run", "--nonsense"], ["--state-dir", "relative", "ps"]])
def test_bad_usage_is_2(arguments):
    done = sandbox(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_requirements_are_pinned_with_hashes_and_without_addresses():
    for name in ("run.txt", "dev.txt"):
        text = (ROOT / "requirements" / name).read_text()
        assert not re.search(r"https?:|--index|--extra|--find-links|@ ", text)
        for line in text.splitlines():
            if line and not line.startswith((" ", "#")):
                assert "==" in line
                assert line.endswith("\\")


def test_no_committed_file_names_a_registry_or_a_machine():
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=False).stdout.split()
    pattern = re.compile(
        r"https?://[\w.-]*(?:python"
        r"hosted|py"
        r"pi|npm"
        r"js|crates|debian)|(?:^|[^\w/])/(?:wor"
        r"k|far"
        r"m)/"
    )
    for name in listed:
        path = ROOT / name
        if path.is_file():
            assert not pattern.search(path.read_text(errors="replace")), name


def test_what_a_program_writes_comes_in_pieces_and_a_failure_at_the_end():
    big = "head -c 3000000 /dev/zero"
    pieces = list(hostcmd.stream(["sh", "-c", big]))
    assert (sum(map(len, pieces)), len(pieces)) == (3000000, 3)
    read = []
    with pytest.raises(HostError, match=r"sh failed with status 7: no such\\x1b\[2J thing"):
        read.extend(hostcmd.stream(["sh", "-c", f"{big}; printf 'no such\\033[2J thing' >&2; exit 7"]))
    assert sum(map(len, read)) == 3000000


def test_a_program_that_nobody_reads_any_more_is_killed():
    word = f"unread-{os.getpid()}"
    pieces = hostcmd.stream(["yes", word])
    assert len(next(pieces)) == 1 << 20
    assert subprocess.run(["pgrep", "-fx", f"yes {word}"], capture_output=True, check=False).returncode == 0
    pieces.close()
    assert subprocess.run(["pgrep", "-fx", f"yes {word}"], capture_output=True, check=False).returncode == 1
