"""An app sees, signals and outlives nothing but its own processes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from tests.conftest import EXAMPLES, census, wait_for

SEE = """
import json, os
pids = sorted(int(n) for n in os.listdir("/proc") if n.isdigit())
names = [open(f"/proc/{p}/comm").read().strip() for p in pids]
try:
    os.kill(TARGET, 0); signalled = "ok"
except OSError as e:
    signalled = e.strerror
print(json.dumps([pids, names, signalled]))
"""


def test_a_dyno_sees_only_its_own_processes(sandbox, engine):
    pids, names, signalled = sandbox.attack(engine, f"TARGET = {os.getpid()}\n{SEE}")
    assert names == ["tini", "python3"]
    assert pids[0] == 1
    assert signalled == "No such process"


def test_control_in_the_hosts_pid_namespace_it_sees_and_reaches_us(sandbox):
    """Docker only: with a user namespace the kernel refuses to mount /proc of a foreign pid namespace."""
    code = f"TARGET = {os.getpid()}\n{SEE}"
    pids, _, signalled = sandbox.attack("docker", code, "--waive", "namespaces", mutant="host-pid")
    assert os.getpid() in pids
    # Seen, and refused only because the uid is another: the second layer.
    assert signalled == "Operation not permitted"


ORPHANS = """
import json, os, time
for _ in range(100):
    if os.fork() == 0:
        if os.fork() == 0:
            os._exit(0)
        os._exit(0)
    os.wait()
time.sleep(0.3)
zombies = [p for p in os.listdir("/proc") if p.isdigit() and " Z " in open(f"/proc/{p}/stat").read()]
print(json.dumps(len(zombies)))
"""


def test_orphans_are_reaped(sandbox, engine):
    assert sandbox.attack(engine, ORPHANS) == 0


def test_control_without_our_init_zombies_stay(sandbox, engine):
    code = ORPHANS.replace("os.wait()", "time.sleep(0)")
    assert sandbox.attack(engine, code, mutant="no-init") > 0


def test_a_daemon_that_detached_dies_with_its_dyno(sandbox, engine):
    code = "setsid sh -c 'trap \"\" TERM HUP; while :; do sleep 1; done' </dev/null >/dev/null 2>&1 & sleep 0.2; echo started"
    done = sandbox("run", "--raw", "-q", "--engine", engine, str(EXAMPLES / "shell"), "--", "sh", "-c", code)
    assert done.out == "started\n"
    assert census(sandbox) == []


def named(pid: int) -> str:
    """The process's name; the helpers of a start come and go."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def test_two_dynos_share_no_namespace_and_no_id(sandbox, engine):
    """Read from the host while both live."""
    from sandbox.host import journal, observe
    from sandbox.host.cgroup import Cgroup

    shell = str(EXAMPLES / "shell")
    first, second = (
        sandbox.start("run", "--raw", "-q", "--engine", engine, shell, "--", "sleep", "30") for _ in range(2)
    )
    try:
        folder = f"{sandbox.state}/journal"
        ids = wait_for(
            lambda: [h["id"] for _, h in journal.headers(folder)] if len(journal.paths(folder)) == 2 else None
        )
        pids = [wait_for(lambda i=i: [p for p in Cgroup.at(f"/{i}").pids() if named(p) == "sleep"])[0] for i in ids]
        kinds = [kind for kind in observe.NAMESPACES if not (engine == "docker" and kind == "user")]
        for kind in kinds:
            inodes = {observe.namespace(pid, kind) for pid in (*pids, os.getpid())}
            assert len(inodes) == 3, kind
        uids = {observe.threads(pid)[0].uids[0] for pid in pids}
        assert len(uids) == 2
        assert min(uids) >= 0x70000000
    finally:
        for process in (first, second):
            process.send_signal(signal.SIGINT)
        for process in (first, second):
            process.communicate(timeout=60)


def test_ctrl_c_ends_a_dyno_that_obeys(sandbox, engine):
    process = sandbox.start(
        "run", "--engine", engine, str(EXAMPLES / "shell"), "--", "sh", "-c", "echo ready; exec sleep 60"
    )
    _read_until(process, b"]: ready")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert b"Stopping all processes with SIGTERM" in out
    assert b"stopped with SIGTERM; exited with status 143" in err
    assert census(sandbox) == []


STUBBORN = ("sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.1; done")


def test_a_dyno_that_ignores_sigterm_is_killed_after_the_grace_time(sandbox, engine):
    process = sandbox.start("run", "--engine", engine, "--grace", "1s", str(EXAMPLES / "shell"), "--", *STUBBORN)
    _read_until(process, b"]: ready")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 137
    assert b"Error R12 (Exit timeout) -> At least one process failed to exit within 1 seconds of SIGTERM" in out
    assert b"still alive 1 s after SIGTERM (R12)" in err


def test_a_second_ctrl_c_kills_at_once(sandbox, engine):
    process = sandbox.start("run", "--engine", engine, "--grace", "60s", str(EXAMPLES / "shell"), "--", *STUBBORN)
    _read_until(process, b"]: ready")
    process.send_signal(signal.SIGINT)
    _read_until(process, b"SIGTERM")
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 137
    assert time.monotonic() - begin < 20


def test_a_timeout_ends_with_124_and_says_so(sandbox, engine):
    done = sandbox("run", "--engine", engine, "--timeout", "1s", str(EXAMPLES / "shell"), "--", "sleep", "60")
    assert done.status == 124
    assert "ended by our timeout of 1 s" in done.err


def _read_until(process: subprocess.Popen[bytes], mark: bytes) -> None:
    """Reads lines of stdout until one holds the mark."""
    while line := process.stdout.readline():
        if mark in line:
            return
    raise AssertionError(process.stderr.read())
