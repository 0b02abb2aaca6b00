"""A dyno that burns CPU gets its cap and no more."""

from __future__ import annotations

from tests.conftest import EXAMPLES

BURN = """
import json, os, resource, time
for _ in range(2):
    if os.fork() == 0:
        end = time.monotonic() + 3
        while time.monotonic() < end: pass
        os._exit(0)
begin = time.monotonic()
os.wait(); os.wait()
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps((used.ru_utime + used.ru_stime) / (time.monotonic() - begin)))
"""


def test_two_spinners_get_the_cap(sandbox, engine):
    assert sandbox.attack(engine, BURN, "--cpus", "0.5") <= 0.5 * 1.1


def test_control_without_the_cap_they_get_more(sandbox, engine):
    assert sandbox.attack(engine, BURN, "--cpus", "0.5", "--waive", "cpu") > 0.65


def test_the_time_used_is_reported(sandbox, engine):
    done = sandbox(
        "run", "--json", "--engine", engine, str(EXAMPLES / "shell"), "--", "python3", "-c",
        "import time\nwhile time.process_time() < 1: pass",
    )  # fmt: skip
    assert 1_000_000 <= done.json()["cpu_us"] < 3_000_000
