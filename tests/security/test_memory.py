"""One app must not be able to use up the host's memory, and must be told when it is over its quota."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import EXAMPLES, lines

MIB = 1024 * 1024

BOMB = """
import time
hold = []
for step in range({steps}):
    hold.append(bytearray(b"x" * {mib} * 1048576))
    print("holding", (step + 1) * {mib}, flush=True)
time.sleep({pause})
"""


def bomb(sandbox, engine, *options, steps=40, mib=8, pause=0, mutant=""):
    return sandbox(
        "run", "--engine", engine, "--memory", "64M", *options, str(EXAMPLES / "shell"), "--", "python3", "-",
        stdin=BOMB.format(steps=steps, mib=mib, pause=pause), mutant=mutant,
    )  # fmt: skip


def available() -> int:
    text = Path("/proc/meminfo").read_text()
    return int(text.split("MemAvailable:")[1].split()[0]) * 1024


def test_a_memory_bomb_dies_at_the_kill_limit_and_the_reason_is_named(sandbox, engine):
    before = available()
    done = bomb(sandbox, engine)
    assert done.status == 137
    held = max(int(line.split()[1]) for line in lines(done) if line.startswith("holding"))
    assert held < 128, "the kill limit is twice the quota of 64 MiB"
    assert "Error R15 (Memory quota vastly exceeded)" in lines(done, "heroku")
    assert "it reached 128 MiB, its quota is 64 MiB" in done.err
    assert "python3" in done.err, "the killed process is named"
    assert abs(before - available()) < 512 * MIB


def test_control_without_the_memory_clause_the_bomb_holds_what_it_wants(sandbox, engine):
    done = bomb(sandbox, engine, "--waive", "memory", "--waive", "swap", steps=30)
    assert done.status == 0
    assert "holding 240" in lines(done)


def test_over_quota_is_r14_at_every_sample_with_herokus_lines(sandbox, engine):
    done = bomb(sandbox, engine, "--sample", "300ms", steps=10, mib=8, pause=2)
    platform = lines(done, "heroku")
    assert done.status == 0, done
    assert platform.count("Error R14 (Memory quota exceeded)") >= 3
    running = next(line for line in platform if line.startswith("Process running mem="))
    assert running.endswith("%)")
    assert running.split("mem=")[1].split("M(")[0].isdigit()


def test_control_under_quota_there_is_no_r14(sandbox, engine):
    done = bomb(sandbox, engine, "--sample", "300ms", steps=2, mib=8, pause=1)
    assert done.status == 0
    assert not [line for line in lines(done, "heroku") if "R14" in line]


def test_shared_memory_counts_and_is_bounded(sandbox, engine):
    code = """
import json
n = 0
try:
    with open("/dev/shm/x", "wb") as f:
        while n < 256:
            f.write(b"x" * 1048576); f.flush(); n += 1
except OSError as e:
    print(json.dumps([n, e.errno]))
"""
    written, errno = sandbox.attack(engine, code, "--memory", "128M")
    assert errno == 28, "ENOSPC"
    assert written == 32, "a quarter of the quota"


def test_control_without_a_size_shared_memory_holds_more(sandbox, engine):
    code = """
import json
with open("/dev/shm/x", "wb") as f:
    for n in range(80):
        f.write(b"x" * 1048576); f.flush()
print(json.dumps(n + 1))
"""
    assert sandbox.attack(engine, code, "--memory", "128M", "--waive", "mounts", mutant="big-shm") == 80


def test_the_app_can_see_its_own_limit(sandbox, engine):
    code = """
import json, os
print(json.dumps([int(open("/sys/fs/cgroup/memory/memory.limit_in_bytes").read()), os.environ["MEMORY_AVAILABLE"], os.environ["WEB_CONCURRENCY"]]))
"""
    assert sandbox.attack(engine, code, "--size", "standard-2x") == [1 << 30, "1024", "2"]


def test_the_peak_is_reported(sandbox, engine):
    done = sandbox(
        "run", "--json", "--engine", engine, str(EXAMPLES / "shell"), "--", "python3", "-c", "x = b'x' * 100_000_000"
    )
    assert 95 * MIB < done.json()["memory_peak_bytes"] < 200 * MIB
