"""Times whole processes, in turn, and writes docs/PERFORMANCE.md with the machine's facts.

Medians of interleaved runs: a machine whose speed drifts drifts for all of them, and the ratios stay.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench import network, report
from tests.conftest import ROOT, Instance, census, default_state, make_instance, unmount_below, wait_for
from tests.world import World

RUNS = int(os.environ.get("BENCH_RUNS", "15"))
BIN = Path(sys.executable).parent
TARGETS = {"oci": 0.5, "docker": 1.25, "help": 3.0}


def docker_daemon(base: Path, world: World) -> tuple[subprocess.Popen[bytes], str]:
    """A daemon of our own, with its bridge and its iptables, in the namespace that plays the host."""
    base.mkdir()
    host = f"unix://{base}/docker.sock"
    log = (base / "log").open("wb")
    daemon = subprocess.Popen(
        [
            *world.host.argv(), "dockerd", "--data-root", str(base / "data"), "--exec-root", str(base / "exec"), "-H", host, "-p", str(base / "pid"),
        ],
        stdout=log, stderr=log, start_new_session=True,
    )  # fmt: skip
    wait_for(lambda: "API listen" in (base / "log").read_text(), 60, "the Docker daemon")
    return daemon, host


def timed(argv: list[str], env: dict[str, str]) -> float:
    begin = time.perf_counter()
    done = subprocess.run(argv, capture_output=True, env=env, check=False)
    elapsed = time.perf_counter() - begin
    if done.returncode != 0:
        sys.exit(f"{argv} failed: {done.stderr.decode()}")
    return elapsed * 1000


def measure(instance: Instance, app: str, image: str) -> dict[str, list[float]]:
    env = {
        **{k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"},
        "SANDBOX_STATE_DIR": str(instance.state), "SANDBOX_RUN_DIR": str(instance.run_dir), "SANDBOX_DOCKER_HOST": instance.docker_host,
    }  # fmt: skip
    if instance.pool:
        env["SANDBOX_POOL"] = instance.pool
    here = instance.world.host.argv()
    sandbox = [*here, str(BIN / "sandbox"), "run", "--raw", "-q"]
    commands = {
        "docker run": [
            *here, "docker", "-H", instance.docker_host, "run", "--rm", "--network=none", "--memory=1g", "--memory-swap=1g", "--pids-limit=256",
            "--cap-drop=ALL", "--security-opt=no-new-privileges", "--read-only", "--user=1000:1000", image, "/bin/true",
        ],
        "sandbox run, embedded engine": [*sandbox, "--engine", "oci", app, "--", "/bin/true"],
        "sandbox run, Docker engine": [*sandbox, "--engine", "docker", app, "--", "/bin/true"],
        "sandbox --help": [str(BIN / "sandbox"), "--help"],
        "python -I -c pass": [sys.executable, "-I", "-c", "pass"],
    }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in commands}
    for name, argv in commands.items():
        timed(argv, env)  # warm
        print(f"warm: {name}", file=sys.stderr)
    for _ in range(RUNS):
        for name, argv in commands.items():
            times[name].append(timed(argv, env))
    return times


def phases(instance: Instance, app: str) -> dict[str, dict[str, float]]:
    """Median milliseconds of each phase, per engine, from --json."""
    found: dict[str, dict[str, float]] = {}
    for engine in ("oci", "docker"):
        runs = [
            instance("run", "--json", "--engine", engine, app, "--", "/bin/true").json()["phases_ms"]
            for _ in range(max(3, RUNS // 2))
        ]
        found[engine] = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return found


def memory(instance: Instance, app: str) -> dict[str, float]:
    """Resident MiB of everything of ours around one idle dyno: proportional set size, so that shared pages count once."""
    process = instance.start("run", "--raw", "-q", "--engine", "oci", app, "--", "sleep", "60")
    conmon = wait_for(lambda: next(iter(instance.run_dir.glob("dynos/*/conmon.pid")), None))
    shim = int(conmon.read_text())
    init = int(wait_for(lambda: next(iter(instance.run_dir.glob("dynos/*/pid")), None)).read_text())
    wait_for(lambda: "sleep" in Path(f"/proc/{init}/task/{init}/children").read_text() or children(init))
    time.sleep(1)
    result = {
        "sandbox run (CLI and embedded supervisor)": pss(process.pid),
        "conmon (shim)": pss(shim),
        "tini (init)": pss(init),
    }
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    return result


def children(pid: int) -> bool:
    return bool(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def pss(pid: int) -> float:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(text.split("\nPss:")[1].split()[0]) / 1024


def render(
    times: dict[str, list[float]], by_phase: dict[str, dict[str, float]], resident: dict[str, float], versions: str
) -> str:
    median = {name: statistics.median(values) for name, values in times.items()}
    base, python = median["docker run"], median["python -I -c pass"]
    rows = [
        ("sandbox run, embedded engine", median["sandbox run, embedded engine"] / base, TARGETS["oci"], "× docker run"),
        ("sandbox run, Docker engine", median["sandbox run, Docker engine"] / base, TARGETS["docker"], "× docker run"),
        ("sandbox --help", median["sandbox --help"] / python, TARGETS["help"], "× python -I -c pass"),
    ]
    out = [
        "# Performance\n",
        "Written by `make bench`; every figure is from one run on one machine, whole processes, interleaved. Absolute times",
        "belong to that machine; the ratios are what to compare.\n",
        f"- {time.strftime('%Y-%m-%d', time.gmtime())}, Linux {platform.release()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
        f"- {versions}",
        f"- {RUNS} runs each, warm caches, `/bin/true` in the same stack image; `docker run` with memory, pids, cap-drop,",
        "  no-new-privileges, read-only and network none\n",
        "| command | median ms | min | max |",
        "|---|---|---|---|",
        *(f"| {name} | {median[name]:.0f} | {min(values):.0f} | {max(values):.0f} |" for name, values in times.items()),
        "\n| target | measured | at most | holds |",
        "|---|---|---|---|",
        *(
            f"| {name}, {unit} | {ratio:.2f} | {most} | {'yes' if ratio <= most else f'**no**, by {ratio / most - 1:.0%}'} |"
            for name, ratio, most, unit in rows
        ),
        "\n## Where the time goes\n",
        "Median milliseconds by phase, as `--json` reports them; the rest of the whole process is Python's start and imports.\n",
        "| phase | embedded | Docker |",
        "|---|---|---|",
        *(
            f"| {name} | {by_phase['oci'][name]:.1f} | {by_phase['docker'].get(name, 0):.1f} |"
            for name in by_phase["oci"]
        ),
        "\n## Resident memory around one idle dyno\n",
        "| part | MiB (proportional) |",
        "|---|---|",
        *(f"| {name} | {value:.1f} |" for name, value in resident.items()),
        f"| together | {sum(resident.values()):.1f} |",
        "",
    ]
    return "\n".join(out)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="sbb-") as folder:
        base = Path(folder)
        base.chmod(0o711)
        world = World(base / "world")
        assert (default_state() / "stack").exists(), "make setup comes first"
        daemon, host = docker_daemon(base / "docker", world)
        try:
            instance = make_instance(base, "bench", host)
            instance.pool = ""  # the default one: 2,000 dynos need room
            app = base / "app"
            app.mkdir()
            (app / "Procfile").write_text("web: /bin/true\n")
            first = instance("run", "--json", "--engine", "docker", str(app), "--", "/bin/true")
            assert first.status == 0, first
            image = subprocess.run(
                ["docker", "-H", host, "images", "-q"], capture_output=True, text=True, check=True
            ).stdout.split()[0]
            if sys.argv[1:] == ["report"]:
                print("\n".join(report.render(report.measure(instance))))
                return
            if sys.argv[1:] == ["network"]:
                print(network.measure(instance, world, host, image))
                return
            times = measure(instance, str(app), image)
            versions = json.dumps(
                [f["evidence"] for f in instance("doctor", "--json").json()["findings"] if f["topic"] == "engine oci"]
            )
            server = subprocess.run(
                ["docker", "-H", host, "version", "-f", "{{.Server.Version}}"],
                capture_output=True,
                text=True,
                check=True,
            )
            versions = f"runtime {json.loads(versions)[0].split(';')[0]}; Docker {server.stdout.strip()}"
            text = render(times, phases(instance, str(app)), memory(instance, str(app)), versions)
            text += "\n" + network.measure(instance, world, host, image)
            text += "\n".join(report.render(report.measure(instance))) + "\n"
            left = census(instance)
            assert left == [], left
        finally:
            instance.remove_network()
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(30)
            unmount_below(base)
            world.__exit__()
    print(text)
    (ROOT / "docs" / "PERFORMANCE.md").write_text(text)


if __name__ == "__main__":
    main()
