"""A fork bomb stays in its dyno."""

from __future__ import annotations

from tests.conftest import EXAMPLES, lines

FORKS = """
import json, os, time, errno
n, code = 0, 0
try:
    while n < {most}:
        if os.fork() == 0:
            time.sleep(20); os._exit(0)
        n += 1
except OSError as e:
    code = e.errno
print(json.dumps([n, errno.errorcode.get(code)]), flush=True)
os._exit(0)
"""

THREADS = """
import json, threading, time
n = 0
try:
    while n < 1000:
        threading.Thread(target=time.sleep, args=(20,), daemon=True).start(); n += 1
except RuntimeError:
    pass
print(json.dumps(n), flush=True)
import os; os._exit(0)
"""


def test_forks_end_at_the_limit_with_eagain(sandbox, engine):
    forked, error = sandbox.attack(engine, FORKS.format(most=1000), "--pids", "64")
    assert error == "EAGAIN"
    # Init, the program itself, and in Docker's shim accounting nothing else.
    assert 60 <= forked <= 62


def test_threads_count_as_processes(sandbox, engine):
    assert 60 <= sandbox.attack(engine, THREADS, "--pids", "64") <= 62


def test_control_without_the_clause_the_forks_go_on(sandbox, engine):
    forked, error = sandbox.attack(
        engine, FORKS.format(most=150), "--pids", "64", "--waive", "pids", "--waive", "rlimits", mutant="no-rlimits"
    )
    assert (forked, error) == (150, None)


def test_a_real_fork_bomb_is_contained_reported_and_ended(sandbox, engine):
    done = sandbox(
        "run", "--engine", engine, "--timeout", "3s", "--grace", "1s", str(EXAMPLES / "shell"), "--", "bash", "-c", "f() { f | f & }; f; sleep 30",
    )  # fmt: skip
    assert done.status == 124
    assert [line for line in lines(done, "heroku") if "Process limit reached" in line and "256" in line]


def test_hits_are_counted_in_the_document(sandbox, engine):
    code = FORKS.format(most=1000) + "\n"
    done = sandbox(
        "run", "--json", "--engine", engine, "--pids", "64", str(EXAMPLES / "shell"), "--", "python3", "-", stdin=code
    )
    document = done.json()
    assert document["pids_limit_reached"] is True
    assert document["pids_max"] == document["pids_peak"] == 64
