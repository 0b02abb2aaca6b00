"""A host as users run it: systemd, unified cgroups, AppArmor, other firewalls, a Docker daemon of its own.

Runs in a guest, in the guest's own network: its first namespace is the host here, and the decoys are beyond a veth.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import EXAMPLES, Instance, census, wait_for
from tests.security.cell import Cell, web_app
from tests.world import METADATA, PRIVATE, PUBLIC, World

pytestmark = pytest.mark.skipif(not Path("/payload/source").exists(), reason="runs in a guest of tests/vm only")
UNIFIED = Path("/sys/fs/cgroup/cgroup.controllers").exists()


@pytest.fixture(scope="session")
def instance(tmp_path_factory) -> Instance:
    """An instance in the guest's own network, beside the guest's own Docker daemon."""
    base = Path("/var/tmp/host")
    base.mkdir(mode=0o711, exist_ok=True)
    with World(base / "world", own=True) as world:
        for address in (PUBLIC, PRIVATE, METADATA):
            world.listeners.add(world.outside, address, 80)
        made = Instance(Path("/var/lib/sandbox"), Path("/run/sandbox"), "unix:///run/docker.sock", World.current)
        yield made
        made.remove_network()
        assert census(made) == []


def run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout


@contextlib.contextmanager
def sleeping(instance: Instance, engine: str):
    """A dyno that sleeps, and its record."""
    before = set(instance.run_dir.glob("dynos/*/record.json"))
    dyno = instance.start("run", "--raw", "-q", "--engine", engine, str(EXAMPLES / "shell"), "--", "sleep", "600")
    try:
        found = wait_for(
            lambda: set(instance.run_dir.glob("dynos/*/record.json")) - before, 400, "the dyno"
        )  # Docker imports the stack at the first
        yield dyno, json.loads(found.pop().read_text())
    finally:
        if dyno.poll() is None:
            dyno.send_signal(signal.SIGTERM)
        dyno.communicate(timeout=180)


def group(pid: int) -> Path:
    line = next(line for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines() if line.startswith("0::"))
    return Path("/sys/fs/cgroup" + line.removeprefix("0::"))


LIMITS = ("memory.max", "memory.swap.max", "pids.max", "cpu.max", "cpu.weight")


@pytest.mark.parametrize("engine", ["oci", "docker"])
def test_limits_outlive_a_reload_of_systemd(instance, engine):
    with sleeping(instance, engine) as (_, record):
        folder = group(record["pid"])
        before = {name: (folder / name).read_text() for name in LIMITS}
        assert before["memory.max"] != "max\n"
        assert before["pids.max"] != "max\n"
        run("systemctl", "daemon-reload")
        run("systemctl", "daemon-reexec")
        time.sleep(2)
        assert group(record["pid"]) == folder
        assert {name: (folder / name).read_text() for name in LIMITS} == before
        # The control: a limit that somebody did change is seen, by the same reading and by a report.
        (folder / "pids.max").write_text("max")
        assert (folder / "pids.max").read_text() != before["pids.max"]
        seen = instance("report", "--format", "json", record["spec"]["container_id"], timeout=180)
        status = {check["id"]: check["status"] for check in json.loads(seen.out)["checks"]}
        assert status["RES-05"] == "fail"
        assert status["RES-01"] != "fail"


def test_the_peak_of_memory_is_the_kernels(instance):
    code = "b = bytearray(200 << 20); del b; print('{}')"
    done = instance("run", "-q", "--json", "--engine", "oci", str(EXAMPLES / "shell"), "--", "python3", "-c", code)
    assert done.status == 0, done
    assert json.loads(done.out[done.out.index("{\n") :])["memory_peak_bytes"] > 200 << 20


def test_a_dyno_that_runs_out_of_memory_ends_as_a_whole(instance):
    """memory.oom.group stays off: the supervisor ends all of it, by cgroup.kill, and says why."""
    code = "import os, time\nif os.fork():\n  time.sleep(300)\nelse:\n  b = [bytearray(64 << 20) for _ in range(100)]"
    begin = time.monotonic()
    done = instance(
        "run", "-q", "--json", "--engine", "oci", str(EXAMPLES / "shell"), "--", "python3", "-c", code, timeout=200
    )
    assert "R15" in done.out + done.err, done
    assert time.monotonic() - begin < 150  # the parent would have slept for five minutes
    assert census(instance) == []


@pytest.mark.parametrize("engine", ["oci", "docker"])
def test_the_apparmor_profile_is_in_force(instance, engine):
    done = instance(
        "run", "--raw", "-q", "--engine", engine, str(EXAMPLES / "shell"), "--", "cat", "/proc/self/attr/current"
    )
    assert done.status == 0, done
    assert "sandbox-dyno-" in done.out
    assert "unconfined" not in done.out
    # The control: without it nothing starts, and the message names the clause.
    refused = instance("run", "-q", "--engine", engine, str(EXAMPLES / "shell"), "--", "true", mutant="no_label")
    assert refused.status == 125, refused
    assert "label: promised sandbox-dyno-" in refused.err


def test_the_profile_denies_root_what_a_dyno_must_not_do():
    """A process with every right, under the profile and without: what only the profile denies."""
    from sandbox.host import apparmor

    name = apparmor.ensure()
    attempts = {
        "mount": "mount -t tmpfs none /mnt && umount /mnt",
        "a packet socket": "python3 -c 'import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)'",
        "a kernel switch": "echo 0 > /proc/sys/kernel/sysrq",
        "another user": "setpriv --reuid=1 --clear-groups true",
    }
    for what, attempt in attempts.items():
        enter = f"echo exec {name} > /proc/self/attr/exec; exec sh -c"
        with_it = subprocess.run(["sh", "-c", f"{enter} {json.dumps(attempt)}"], capture_output=True, check=False)
        without = subprocess.run(["sh", "-c", attempt], capture_output=True, check=False)
        assert without.returncode == 0, (what, without)
        assert with_it.returncode != 0, what


def test_without_unprivileged_user_namespaces_both_engines_refuse(instance):
    path = Path("/proc/sys/kernel/unprivileged_userns_clone")
    if not path.exists():
        path = Path("/proc/sys/user/max_user_namespaces")
    before = path.read_text()
    path.write_text("0")
    try:
        # Docker's dynos have none of their own, but one maps the owners of their files.
        for engine in ("oci", "docker"):
            done = instance("run", "-q", "--engine", engine, str(EXAMPLES / "shell"), "--", "true")
            assert done.status == 125, done
            assert "user namespace" in done.err
            assert census(instance) == []
    finally:
        path.write_text(before)
    assert instance("run", "-q", "--engine", "oci", str(EXAMPLES / "shell"), "--", "true").status == 0


FIREWALLS = {
    "ufw": (("ufw", "--force", "enable"), ("ufw", "reload"), ("ufw", "--force", "disable")),
    "firewalld": (
        ("systemctl", "start", "firewalld"),
        ("firewall-cmd", "--reload"),
        ("systemctl", "stop", "firewalld"),
    ),
}
SETTINGS = Path("/etc/firewalld/firewalld.conf")


@pytest.mark.parametrize("name", FIREWALLS)
def test_beside_another_firewall_the_wall_stands_and_the_app_works(instance, name):
    start, reload, stop = FIREWALLS[name]
    if name == "firewalld":
        SETTINGS.write_text(SETTINGS.read_text().replace("NftablesTableOwner=yes", "NftablesTableOwner=no"))
    targets = [("tcp", PUBLIC, 80), ("tcp", PRIVATE, 80), ("tcp", METADATA, 80), ("udp", METADATA, 80)]
    run(*start)
    try:
        with cell_of(instance) as cell:
            for when in ("started", "reloaded"):
                if when == "reloaded":
                    run(*reload)
                    # Its reload takes our accept out of its chain: the guard puts it back.
                    wait_for(lambda: cell.attempt(targets[:1], wait=1), 30, "the way out after the reload")
                assert cell.attempt(targets, wait=3) == {("tcp", PUBLIC, 80)}, (name, when)
                assert not [seen for seen in World.current.listeners.seen if PRIVATE in seen or METADATA in seen]
    finally:
        run(*stop)


def test_a_firewall_that_lets_nobody_in_refuses_the_start(instance):
    """Debian 13's firewalld owns its table (flags owner, persist): no accept of ours can be put into it."""
    if "NftablesTableOwner" not in SETTINGS.read_text():
        assert "bookworm" in Path("/etc/os-release").read_text()  # its firewalld knows no such flag
        return
    SETTINGS.write_text(SETTINGS.read_text().replace("NftablesTableOwner=no", "NftablesTableOwner=yes"))
    instance.remove_network()
    run("systemctl", "start", "firewalld")
    try:
        assert "flags owner" in run("nft", "list", "ruleset")
        done = instance("run", "-q", "--engine", "oci", str(EXAMPLES / "shell"), "--", "echo", "ran")
        assert done.status == 125, done
        assert "NftablesTableOwner=no" in done.err
        assert "ran" not in done.out.split()
    finally:
        run("systemctl", "stop", "firewalld")


@contextlib.contextmanager
def cell_of(instance: Instance):
    # It binds no port, and a reload of a firewall takes an emulated processor a minute.
    cell = Cell(instance, "oci", "--boot-timeout", "1h", app=web_app(Path("/var/tmp/host")), process=())
    try:
        yield cell
    finally:
        cell.close()


def test_a_docker_daemon_that_is_restarted_under_a_dyno(instance):
    """Docker takes its containers down with it: the run ends, says so, and leaves nothing."""
    with sleeping(instance, "docker") as (dyno, record):
        run("systemctl", "restart", "docker")
        out, err = dyno.communicate(timeout=180)
        assert dyno.returncode != 0, (out, err)
        assert not Path(f"/proc/{record['pid']}").exists() or os.stat(f"/proc/{record['pid']}").st_uid == 0
    assert instance("gc", timeout=120).status == 0
    assert census(instance) == []


def test_every_packet_of_ours_survives_a_flush_by_somebody_else(instance):
    """Nftables with owner and persist flags would keep others out; ours has neither and is put back."""
    with sleeping(instance, "oci"):
        run("nft", "flush", "ruleset")
        wait_for(lambda: "table inet sandbox" in run("nft", "list", "ruleset"), 20, "our table in the host")


def test_gvisor_is_refused_by_clause_and_runs_when_they_are_waived(instance):
    app = str(EXAMPLES / "shell")
    refused = instance("run", "-q", "--engine", "oci", "--runtime", "runsc", app, "--", "true")
    assert refused.status == 125, refused
    waived = [word for word in refused.err.split("accept it by name: ")[1].split() if word != "--waive"]
    assert "seccomp" in waived
    options = [word for name in waived for word in ("--waive", name)]
    done = instance(
        "run", "--raw", "-q", "--engine", "oci", "--runtime", "runsc", *options, app, "--", "ls", "/app", timeout=200
    )
    assert (done.status, done.out.split()) == (0, ["report.sh"]), done


@pytest.mark.parametrize("runtime", ["runc", "crun"])
def test_an_app_may_signal_its_own_processes_and_no_others(instance, runtime):
    """Under crun the kernel stacks our profile on crun's own; a label of two parts must still be a peer of itself."""
    code = "import os, signal, time\nchild = os.fork()\nif not child: time.sleep(60)\nos.kill(child, signal.SIGKILL)\nprint(os.wait()[1])"
    done = instance(
        "run", "--raw", "-q", "--engine", "oci", "--runtime", runtime, str(EXAMPLES / "shell"), "--", "python3", "-c", code
    )  # fmt: skip
    assert (done.status, done.out.split()) == (0, ["9"]), done
