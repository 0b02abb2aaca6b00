"""What reports cost: evidence of live dynos, a twin, all mutants."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import EXAMPLES, Instance, wait_for

RUNS = int(os.environ.get("BENCH_RUNS", "15"))
MANY = 20
TARGETS = {
    "kernel evidence of one live dyno, ms": 100.0,
    "init stands still, ms": 1.0,
    f"kernel evidence of {MANY} live dynos, ms": 600.0,
    "a twin with all probes, s": 10.0,
    "all mutants, s": 90.0,
}
# Runs in the instance's network, as the command would: reads, and prints what it took.
PROBE = """
import gc, json, sys, time
gc.disable()  # as the command does
from sandbox import config
from sandbox.dyno import record
from sandbox.report import filter, make, rows
from sandbox.report.surroundings import Surroundings
where = config.load(state_dir=sys.argv[1], run_dir=sys.argv[2])
times, stops = [], []
for turn in range(int(sys.argv[3])):
    begin = time.perf_counter()
    found = record.live(where)
    read = list(make.evidence(where, found, Surroundings(where)))
    times.append((time.perf_counter() - begin) * 1000)
    assert all(item.lives and len(item.results) == len(rows.ALL) for item in read)
    stops += [filter.read(where, item.pid, rows.CALLS).stopped_ms for item in found]
print(json.dumps([len(found), times[1:] or times, stops[1:] or stops]))
"""


def measure(instance: Instance) -> dict[str, float]:
    """Medians, milliseconds and seconds as named in TARGETS."""
    found: dict[str, float] = {}
    for count in (1, MANY):
        dynos = [
            instance.start("run", "--raw", "-q", "--engine", "oci", str(EXAMPLES / "shell"), "--", "sleep", "600")
            for _ in range(count)
        ]
        try:
            wait_for(lambda count=count: _live(instance) == count, 120, f"{count} dynos")
            times, stops = _read(instance, count)
            if count == 1:
                found["kernel evidence of one live dyno, ms"] = statistics.median(times)
                found["init stands still, ms"] = statistics.median(stops)
            else:
                found[f"kernel evidence of {MANY} live dynos, ms"] = statistics.median(times)
        finally:
            for dyno in dynos:
                dyno.terminate()
            for dyno in dynos:
                dyno.communicate(timeout=120)
    app = str(EXAMPLES / "python-web")
    done = instance("report", "-q", "--engine", "oci", "--format", "json", app, timeout=600)
    found["a twin with all probes, s"] = done.json()["seconds"]
    begin = time.perf_counter()
    done = instance("report", "-q", "--full", "--engine", "oci", "--format", "json", app, timeout=600)
    whole = time.perf_counter() - begin
    found["all mutants, s"] = whole - found["a twin with all probes, s"]
    found["mutants"] = done.json()["summary"]["mutants_made"]
    return found


def _live(instance: Instance) -> int:
    return len(list(Path(instance.run_dir).glob("dynos/*/record.json")))


def _read(instance: Instance, count: int) -> tuple[list[float], list[float]]:
    import json

    runs = max(3, RUNS if count == 1 else RUNS // 2)
    command = [sys.executable, "-c", PROBE, str(instance.state), str(instance.run_dir), str(runs)]
    if instance.pool:
        command = ["env", f"SANDBOX_POOL={instance.pool}", *command]
    done = subprocess.run(instance.world.host.argv(*command), capture_output=True, text=True, check=True)
    number, times, stops = json.loads(done.stdout.splitlines()[-1])
    assert number == count, (number, count)
    return times, stops


def render(found: dict[str, float]) -> list[str]:
    lines = [
        "",
        "## Isolation reports",
        "",
        f"Readings of all {_rows()} checks, warm; the first one of a filter's bytes adds the time to emulate it (about 0.1 s).",
        "",
        "| | measured | at most | holds |",
        "|---|---|---|---|",
    ]
    for name, most in TARGETS.items():
        value = found[name]
        holds = "yes" if value <= most else f"**no**, by {100 * (value / most - 1):.0f}%"
        lines.append(f"| {name} | {value:.1f} | {most:g} | {holds} |")
    lines.append(f"| mutants made | {found['mutants']:.0f} | | |")
    return lines


def _rows() -> int:
    from sandbox.report.rows import ALL

    return len(ALL)
