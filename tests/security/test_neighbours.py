"""One dyno cannot use up or hold what another needs, although both live on one kernel and one stack image."""

from __future__ import annotations

import subprocess

import pytest

from tests.conftest import EXAMPLES

SHELL = str(EXAMPLES / "shell")


@pytest.fixture
def neighbour(sandbox):
    """Starts a dyno that runs a Python program, says ``ready`` and stays until the test is over."""
    started: list[subprocess.Popen[bytes]] = []

    def start(engine: str, code: str, *options: str, mutant: str = "") -> None:
        program = f"{code}\nprint('ready', flush=True)\nimport sys; sys.stdin.read()"
        process = sandbox.start(
            "run",
            "--raw",
            "-q",
            "--engine",
            engine,
            *options,
            SHELL,
            "--",
            "python3",
            "-c",
            program,
            mutant=mutant,
            stdin=subprocess.PIPE,
        )
        started.append(process)
        assert process.stdout.readline() == b"ready\n", process.stderr.read()

    yield start
    for process in started:
        process.communicate(timeout=60)


INOTIFY = """
import ctypes, json
libc, n = ctypes.CDLL(None), 0
while n < 400 and libc.inotify_init1(0) >= 0: n += 1
"""


def test_inotify_instances_of_one_are_not_the_others(sandbox, neighbour, engine):
    neighbour(engine, INOTIFY)
    assert sandbox.attack(engine, INOTIFY + "print(json.dumps(n))") == 128


def test_control_with_one_creator_for_all_the_next_gets_none(sandbox, neighbour):
    """User namespaces made by root: the kernel charges all instances to root."""
    options = ("--waive", "rlimits")
    neighbour("oci", INOTIFY, *options, mutant="root-creates")
    assert sandbox.attack("oci", INOTIFY + "print(json.dumps(n))", *options, mutant="root-creates") < 128


LOCK = "import fcntl; held = open('/usr/bin/tac'); fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)"
TRY = """
import fcntl, json
try:
    fcntl.flock(open("/usr/bin/tac"), fcntl.LOCK_EX | fcntl.LOCK_NB); print(json.dumps("locked"))
except BlockingIOError:
    print(json.dumps("busy"))
"""


def test_a_lock_on_a_stack_file_reaches_nobody_else(sandbox, neighbour, engine):
    neighbour(engine, LOCK)
    assert sandbox.attack(engine, TRY) == "locked"


def test_control_on_shared_inodes_it_does(sandbox, neighbour):
    neighbour("oci", LOCK, mutant="shared-stack")
    assert sandbox.attack("oci", TRY, mutant="shared-stack") == "busy"


BUFFERS = """
import json, socket
listener = socket.socket(); listener.bind(("127.0.0.1", 0)); listener.listen(128)
held, queued = [], 0
for _ in range(60):
    a = socket.create_connection(listener.getsockname()); b, _ = listener.accept()
    a.setblocking(False)
    try:
        while True: queued += a.send(b"x" * 65536)
    except BlockingIOError: pass
    held += [a, b]
    if queued > 200 << 20: break
print(json.dumps(queued >> 20))
"""


def test_socket_buffers_end_at_their_limit(sandbox, engine):
    """An eighth of the quota of 64 MiB, and what one connection may always have."""
    assert sandbox.attack(engine, BUFFERS, "--memory", "64M") < 64


def test_control_without_the_limit_they_pass_the_memory_limit(sandbox, engine):
    queued = sandbox.attack(engine, BUFFERS, "--memory", "64M", mutant="no-tcp-limit")
    assert queued > 128, "the kill limit of the dyno"


TERMINALS = """
import json, os
held = []
try:
    while len(held) < 200: held.append(os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY))
except OSError: pass
print(json.dumps(len(held)))
"""


def test_terminals_end_at_their_bound(sandbox, engine):
    assert sandbox.attack(engine, TERMINALS) == 64


def test_control_dockers_own_terminals_have_none(sandbox):
    assert sandbox.attack("docker", TERMINALS, "--waive", "mounts", mutant="no-root-guard") == 200
