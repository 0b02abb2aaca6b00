"""kill -9 at every step, then any command: nothing of ours may be left, on either engine."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import EXAMPLES, census, default_state, make_instance, unmount_below, wait_for

SHELL = str(EXAMPLES / "shell")


@pytest.fixture(scope="module")
def crashing(home, docker_host):
    """An instance of its own: other tests' dynos must not be in the census."""
    instance = make_instance(home, "crash", docker_host)
    yield instance
    assert census(instance) == []


def steps_of_a_whole_run(instance, engine) -> int:
    """How many steps a run has from the first journal line to the last undo."""
    done = instance("run", "-q", "--raw", "--engine", engine, SHELL, "--", "true", mutant="die-at", DIE_AT="0")
    assert done.status == 0, done
    return max(int(number) for number in re.findall(r"^step (\d+):", done.err, re.MULTILINE))


@pytest.mark.timeout(600)
def test_a_kill_at_any_step_leaves_nothing_after_the_next_command(crashing, engine):
    total = steps_of_a_whole_run(crashing, engine)
    assert total > 15
    for step in range(1, total + 1):
        done = crashing(
            "run", "-q", "--raw", "--engine", engine, SHELL, "--", "true", mutant="die-at", DIE_AT=str(step)
        )
        assert done.status == -signal.SIGKILL, (step, done)
        reclaimed = crashing("gc")
        assert reclaimed.status == 0, (step, done.err, reclaimed)
        assert census(crashing) == [], (step, done.err, reclaimed.out)


def test_control_without_a_next_command_the_leftovers_are_there(crashing, engine):
    """The census can see what it must see."""
    steps = crashing("run", "-q", "--raw", "--engine", engine, SHELL, "--", "true", mutant="die-at", DIE_AT="0").err
    gate = re.search(r"^step (\d+): after _open_gate", steps, re.MULTILINE)[1]
    crashing("run", "-q", "--raw", "--engine", engine, SHELL, "--", "sleep", "60", mutant="die-at", DIE_AT=gate)
    left = census(crashing)
    kinds = {entry.split()[0] for entry in left}
    assert {"mount", "loop", "cgroup", "disk", "uid"} <= kinds, left
    if engine == "oci":
        assert "process" in kinds
    else:
        assert "container" in kinds
    # Any command reclaims, not gc alone.
    done = crashing("run", "--raw", "--engine", engine, SHELL, "--", "echo", "fine")
    assert done.out == "fine\n"
    assert "leftovers of a run that was killed" in done.err
    assert census(crashing) == []


def test_a_living_dyno_is_left_alone(crashing, engine):
    process = crashing.start(
        "run",
        "--raw",
        "-q",
        "--engine",
        engine,
        SHELL,
        "--",
        "sh",
        "-c",
        "echo up; read line; echo got $line",
        stdin=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"up\n"
    assert "Nothing was left behind." in crashing("gc").out
    listed = crashing("ps", "--json")
    rows = __import__("json").loads(listed.out)
    assert [row["engine"] for row in rows] == [engine]
    assert rows[0]["pids"] >= 2
    out, _ = process.communicate(b"word\n", timeout=60)
    assert out == b"got word\n"


def test_a_killed_shim_is_said_and_cleaned_up(crashing):
    """Conmon dies in mid-run: the status is unknown, which is never 0, and the dyno does not live on."""
    process = crashing.start("run", "--engine", "oci", SHELL, "--", "sleep", "60")
    pidfile = wait_for(lambda: next(iter(Path(crashing.run_dir).glob("dynos/*/conmon.pid")), None))
    wait_for(lambda: census_kind(crashing, "sleep"))
    os.kill(int(pidfile.read_text()), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 125
    assert b"exit status is unknown" in err
    assert census(crashing) == []


def test_a_container_killed_behind_dockers_back_is_said(crashing, docker_host):
    process = crashing.start("run", "--engine", "docker", SHELL, "--", "sleep", "60")
    wait_for(lambda: census_kind(crashing, "sleep"))
    subprocess.run(
        f"docker -H {docker_host} ps -q --filter label=sandbox.host | xargs docker -H {docker_host} kill",
        shell=True,
        check=True,
        capture_output=True,
    )
    _, err = process.communicate(timeout=60)
    assert process.returncode == 137
    assert b"SIGKILL" in err
    assert census(crashing) == []


def census_kind(instance, comm: str) -> bool:
    """Whether a process of that name lives in a dyno of the instance."""
    from sandbox.host import journal, observe
    from sandbox.host.cgroup import Cgroup

    for path in journal.paths(f"{instance.state}/journal"):
        for pid in Cgroup.at(f"/{Path(path).stem}").pids():
            try:
                if observe.name(pid) == comm:
                    return True
            except Exception:  # noqa: BLE001 - it ended between the two reads
                continue
    return False


def test_a_lost_journal_is_made_up_for_by_names(crashing):
    """What carries our name and is in no journal goes too; what does not, stays."""
    steps = crashing("run", "-q", "--raw", "--engine", "oci", SHELL, "--", "true", mutant="die-at", DIE_AT="0").err
    gate = re.search(r"^step (\d+): after _open_gate", steps, re.MULTILINE)[1]
    crashing("run", "-q", "--raw", "--engine", "oci", SHELL, "--", "sleep", "60", mutant="die-at", DIE_AT=gate)
    for path in Path(crashing.state).glob("journal/*"):
        path.unlink()
    foreign = Path("/sys/fs/cgroup/pids/sbx-not-ours")
    foreign.mkdir()
    try:
        done = crashing("gc")
        assert "which no journal knew" in done.out
        assert foreign.exists()
    finally:
        foreign.rmdir()
    shutil.rmtree(f"{crashing.run_dir}/runtime", ignore_errors=True)
    assert census(crashing) == []


def test_two_instances_do_not_meet(home, sandbox, docker_host):
    """The same second, the same app, two instances: different ids, and neither reclaims the other's."""
    other = make_instance(home, "other", docker_host)
    mine = sandbox.start("run", "--raw", "-q", "--engine", "oci", SHELL, "--", "sh", "-c", "id -u; echo up; sleep 2")
    assert [mine.stdout.readline(), mine.stdout.readline()] == [b"1000\n", b"up\n"]
    assert "Nothing was left behind." in other("gc").out
    assert other("ps", "--json").out.strip() == "[]"
    done = other("run", "--raw", "-q", "--engine", "oci", SHELL, "--", "echo", "fine")
    assert done.out == "fine\n"
    assert mine.wait(60) == 0
    mine.communicate()
    assert census(other) == []


def test_many_dynos_at_once(crashing):
    """Ten starts together: every one runs, shared layers are mounted once and gone at the end."""
    begin = time.monotonic()
    processes = [
        crashing.start("run", "--raw", "-q", "--engine", "oci", SHELL, "--", "sh", "-c", "echo ok; sleep 1")
        for _ in range(10)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [out for out, _ in outputs] == [b"ok\n"] * 10, outputs
    assert time.monotonic() - begin < 100
    assert census(crashing) == []


def test_a_docker_daemon_that_dies_is_said_and_cleaned_up_later(home):
    """The daemon is killed under a dyno: the dyno does not live on unwatched, and what only the daemon can remove
    goes with the first command after it is back.
    """
    base = home / "mortal"
    base.mkdir()
    socket = f"unix://{base}/docker.sock"

    def daemon() -> subprocess.Popen[bytes]:
        log = (base / "log").open("wb")
        process = subprocess.Popen(
            ["dockerd", "--data-root", str(base / "data"), "--exec-root", str(base / "exec"), "-H", socket, "-p", str(base / "pid"),
             "--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false"],
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        log.close()
        text = (base / "log").read_text
        wait_for(lambda: "API listen" in text() or process.poll() is not None, 60, "the Docker daemon")
        assert process.poll() is None, text()[-2000:]
        return process

    first = daemon()
    instance = make_instance(home, "mortals", socket)
    process = instance.start("run", "--engine", "docker", SHELL, "--", "sleep", "60")
    wait_for(lambda: census_kind(instance, "sleep"), 60)
    containerd = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    first.kill()
    first.wait()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 125, (out, err)
    assert b"was lost" in out
    assert not [entry for entry in census(instance) if entry.startswith("process")]
    for pid in containerd:  # the daemon's own child: it would end with a clean stop
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGTERM)
        wait_for(lambda pid=pid: not Path(f"/proc/{pid}").exists(), 30, "the end of containerd")
    (base / "pid").unlink(missing_ok=True)
    second = daemon()
    try:
        assert instance("gc").status == 0
        assert census(instance) == []
    finally:
        second.send_signal(signal.SIGTERM)
        second.wait(30)
        unmount_below(base)


TREE = "stat -c '%U %a %F' / /usr/bin/env /etc/passwd /app/report.sh; cat /app/report.sh | sha256sum; ls -a / | tr '\\n' ' '"


def test_images_are_copied_where_squashfs_maps_no_owners(home, docker_host, engine):
    """As on Linux 6.1: the same tree with the same owners, kept for the next dyno, and made anew when it was touched."""
    instance = make_instance(home, f"old-{engine}", docker_host)
    (instance.state / "stack").unlink()
    shutil.copytree(default_state() / "stack", instance.state / "stack")
    for index in (instance.state / "stack").glob("*.json"):
        index.write_text(index.read_text().replace(f"{default_state()}/stack", f"{instance.state}/stack"))
    words = ("run", "--raw", "-q", "--engine", engine, str(EXAMPLES / "shell"), "--", "sh", "-c", TREE)
    usual = instance(*words)
    assert usual.status == 0, usual
    assert not list(instance.state.rglob("*.ext4.json"))
    copied = instance(*words, mutant="no_mapped_squashfs", timeout=300)
    assert (copied.status, copied.out) == (0, usual.out), copied
    copies = [Path(str(seal).removesuffix(".json")) for seal in instance.state.rglob("*.ext4.json")]
    assert len(copies) == 2  # the stack and the app
    made = {path: path.stat().st_ino for path in copies}
    assert instance(*words, mutant="no_mapped_squashfs").out == usual.out
    assert {path: path.stat().st_ino for path in copies} == made
    for path in copies:
        path.chmod(0o600)
        with path.open("r+b") as file:
            file.write(b"\0" * 65536)
    again = instance(*words, mutant="no_mapped_squashfs", timeout=300)
    assert (again.status, again.out) == (0, usual.out), again
    assert not made.items() & {path: path.stat().st_ino for path in copies}.items()
    assert census(instance) == []
