"""A live dyno that root weakens by hand, one thing at a time: the next report is red in the rows of that thing, only.

Each was found by somebody who attacked reports without having seen the tests: it was open, and the report said pass.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import wait_for
from tests.security.cell import Cell, hold_guard, router
from tests.security.test_report import _cgroup, cell, red, report, statuses

__all__ = ["cell"]  # a fixture


def inside(live: Cell, *words: str, spaces: str = "-m") -> None:
    subprocess.run(["nsenter", "-t", str(live.pid), spaces, *words], check=True, capture_output=True)


def app_pid(live: Cell) -> int:
    return next(
        int(pid) for pid in (_cgroup(live, "pids") / "cgroup.procs").read_text().split() if int(pid) != live.pid
    )


def bind(source: str, target: str) -> Callable[[Cell], None]:
    return lambda live: inside(live, "mount", "--bind", source, target)


def write(controller: str, name: str, text: str) -> Callable[[Cell], None]:
    def act(live: Cell) -> None:
        (_cgroup(live, controller) / name).write_text(text)

    return act


def switch(name: str, text: str) -> Callable[[Cell], None]:
    return lambda live: inside(live, "sh", "-c", f"echo '{text}' >/proc/sys/net/{name}", spaces="-n")


def nice(live: Cell) -> None:
    os.setpriority(os.PRIO_PROCESS, app_pid(live), -5)


def realtime(live: Cell) -> None:
    # The cgroup has no real-time budget of its own where RT_GROUP_SCHED is on; the policy is what is read.
    os.sched_setscheduler(app_pid(live), os.SCHED_RR, os.sched_param(1))


def resolver(live: Cell) -> None:
    path = f"/proc/{live.pid}/root/etc/resolv.conf"
    line = next(
        line for line in Path(f"/proc/{live.pid}/mountinfo").read_text().splitlines() if " /etc/resolv.conf " in line
    )
    # Read-only in the dyno; the host writes to the file itself.
    disk = sandbox_disk(live)
    (disk / line.split()[3].lstrip("/")).write_text("nameserver 8.8.8.8\n")
    assert "8.8.8.8" in Path(path).read_text()


def sandbox_disk(live: Cell) -> Path:
    return live.sandbox.run_dir / "dynos" / str(live.record["id"]) / "disk"


OWN = {
    "a file over a device": (bind("/usr/bin/env", "/dev/full"), {"FS-02"}),
    "a file system over a read-only folder of /proc": (bind("/usr", "/proc/sys"), {"FS-02"}),
    "/dev/shm without its bounds": (
        lambda live: inside(live, "mount", "-o", "remount,size=4g,nr_inodes=4096000", "/dev/shm"),
        {"FS-02"},
    ),
    "a nice value below zero": (nice, {"PRV-25"}),
    "CPU time saved up": (write("cpu", "cpu.cfs_burst_us", "50000"), {"RES-07"}),
    "no kill at the memory limit": (write("memory", "memory.oom_control", "1"), {"RES-01"}),
    "low ports": (switch("ipv4/ip_unprivileged_port_start", "0"), {"NET-16"}),
    "ICMP sockets": (switch("ipv4/ping_group_range", "0 65000"), {"NET-11"}),
    "another resolver": (resolver, {"NET-19"}),
}


@pytest.mark.parametrize("what", OWN)
def test_what_is_weakened_in_a_dyno_turns_its_rows_red(sandbox, cell, what):
    act, rows = OWN[what]
    live = cell()
    assert red(report(sandbox, live)) == set()
    act(live)
    seen = red(report(sandbox, live))
    assert rows <= seen
    assert seen - rows <= ({"PRV-06", "FS-12"} if rows == {"FS-02"} else set()), (
        "a foreign mount has its own flags and names"
    )


def test_a_thread_in_another_cgroup_turns_its_row_red(sandbox, cell):
    live = cell()
    live("import threading, time\nthreading.Thread(target=time.sleep, args=(120,), daemon=True).start()")
    pid, own = app_pid(live), _cgroup(live, "pids")
    tid = next(name for name in os.listdir(f"/proc/{pid}/task") if int(name) != pid)
    hierarchy = next(folder for folder in own.parents if folder.is_mount())
    other = hierarchy / f"sbt-{os.getpid()}"
    other.mkdir()
    try:
        (other / "tasks").write_text(tid)
        assert red(report(sandbox, live)) == {"PRV-23"}
    finally:
        (own / "tasks").write_text(tid)
        other.rmdir()
    assert red(report(sandbox, live)) == set()


def test_another_overlay_in_the_place_of_app_turns_files_red(sandbox, cell, tmp_path):
    live = cell()
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    options = "lowerdir=lower,upperdir=upper,workdir=work"
    namespace = f"/proc/{live.pid}/ns/mnt"
    # The same type and flags, and no path of the host in its options.
    swap = (
        "import ctypes, os, sys\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "def done(result):\n    assert result >= 0, os.strerror(ctypes.get_errno())\n    return result\n"
        f"own = os.open({namespace!r}, os.O_RDONLY)\n"
        "done(libc.unshare(0x20000)); done(libc.mount(None, b'/', None, 1 << 18 | 1 << 14, None))\n"
        f"os.chdir({str(tmp_path)!r}); done(libc.mount(b'overlay', b'merged', b'overlay', 2 | 4, {options.encode()!r}))\n"
        "tree = done(libc.syscall(428, -100, b'merged', 1))\n"
        "done(libc.setns(own, 0x20000)); done(libc.umount2(b'/app', 2))\n"
        "done(libc.syscall(429, tree, b'', -100, b'/app', 4)); done(libc.mount(None, b'/app', None, 1 << 18, None))\n"
    )
    subprocess.run(["python3", "-c", swap], check=True)
    assert "FS-02" in red(report(sandbox, live))


ROUTER = {
    "a table": ("nft add table ip x", "nft delete table ip x", {"NET-29"}),
    "a routing rule": ("ip rule add pref 50 lookup 91", "ip rule del pref 50", {"NET-28", "NET-29"}),
    "a route": (
        "ip route add unreachable 198.18.0.0/15",
        "ip route del unreachable 198.18.0.0/15",
        {"NET-28", "NET-29"},
    ),
}


@pytest.mark.parametrize("what", ROUTER)
def test_what_is_added_to_the_router_turns_its_rows_red(sandbox, cell, what):
    add, remove, rows = ROUTER[what]
    live = cell()
    router(sandbox, *add.split())
    try:
        assert red(report(sandbox, live)) == rows
    finally:
        router(sandbox, *remove.split())
    assert red(report(sandbox, live)) == set()


def test_a_limit_of_flows_that_was_raised_turns_its_rows_red(sandbox, cell):
    live = cell()
    router(sandbox, "nft", f'delete element inet sandbox fresh {{ "{live.link}" }}')
    more = "limit rate over 1000000/second burst 1000000 packets"
    router(sandbox, "nft", f'add element inet sandbox fresh {{ "{live.link}" {more} }}')
    assert red(report(sandbox, live)) == {"NET-01", "NET-22", "RES-17"}


def test_an_entry_of_the_list_that_was_widened_turns_its_rows_red(sandbox, cell):
    live = cell("--egress", "allow:93.184.216.0/24:443,93.184.215.7,93.184.214.8/29:80")
    assert red(report(sandbox, live)) == set()
    element = f'"{live.link}" . 93.184.216.0-93.184.216.255 . tcp . 443'
    router(sandbox, "nft", f"delete element inet sandbox allow4 {{ {element} }}")
    router(
        sandbox, "nft", f'add element inet sandbox allow4 {{ "{live.link}" . 93.0.0.0-93.255.255.255 . tcp . 1-65535 }}'
    )
    assert red(report(sandbox, live)) == {"NET-01", "NET-30"}


def test_a_dyno_that_is_not_behind_the_router_turns_the_network_red(sandbox, cell):
    live = cell()
    gateway = str(live.record["place"][1]) if "place" in live.record else ""
    pid = hold_guard(sandbox)
    try:
        inside(live, "ip", "link", "del", "eth0", spaces="-n")
        subprocess.run(
            sandbox.world.host.argv("ip", "link", "add", "evil0", "type", "veth", "peer", "name", "eth0", "netns", f"/proc/{live.pid}/ns/net"), check=True
        )  # fmt: skip
        script = (
            "echo 1 >/proc/sys/net/ipv6/conf/eth0/disable_ipv6; ip link set eth0 arp off;"
            f" ip address add {live.address}/30 dev eth0; ip link set eth0 up; {f'ip route add default via {gateway}' if gateway else 'ip route add default dev eth0'}"
        )
        inside(live, "sh", "-ec", script, spaces="-n")
        seen = red(report(sandbox, live))
    finally:
        os.kill(pid, 18)
        subprocess.run(sandbox.world.host.argv("ip", "link", "del", "evil0"), check=False)
    assert {"NET-01", "NET-02", "NET-03", "NET-04", "NET-05", "NET-29"} <= seen
    assert {name.split("-")[0] for name in seen} <= {"NET", "RES"}


def test_what_a_joined_process_brought_along_is_seen(sandbox, cell, tmp_path):
    """A folder, a socket and a process of the host: each by itself, beside the same process without any of them."""
    live = cell()
    holds = {
        "nothing": "",
        "a folder behind a name that is also its own": "os.set_inheritable(os.open('/', os.O_RDONLY), True)",
        "the folder it works in": "folder = True",
        "a socket": "s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); s.set_inheritable(True)",
        "a process": f"os.set_inheritable(os.pidfd_open({os.getpid()}), True)",
    }
    seen = {}
    for what, code in holds.items():
        options = ["-m", "-i", "-n", "-p", *(["--wd=/var"] if "folder" in code else [])]
        program = (
            f"import os, socket\n{code}\n"
            f"os.execvp('nsenter', ['nsenter', '-t', '{live.pid}', *{options!r}, 'python3', '-c', "
            "'import os, time; own = os.open(\"/\", 0); time.sleep(60)'])"
        )
        nothing = subprocess.DEVNULL
        stranger = subprocess.Popen(
            sandbox.world.host.argv("python3", "-c", program), stdin=nothing, stdout=nothing, stderr=nothing
        )
        try:
            found = wait_for(lambda pid=stranger.pid: _descendant(pid), 10, "the stranger")
            (_cgroup(live, "pids") / "cgroup.procs").write_text(str(found))
            time.sleep(0.3)
            document = report(sandbox, live)
            seen[what] = (
                next(c["evidence"] for c in document["checks"] if c["id"] == "PRV-28"),
                "PRV-28" in red(document),
            )
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(found, 9)
            stranger.kill()
            stranger.wait()
    assert not seen["nothing"][1], seen["nothing"]
    for what in list(holds)[1:]:
        assert seen[what][1], (what, seen[what])


def _descendant(pid: int) -> int | None:
    try:
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            command = Path(f"/proc/{child}/cmdline").read_bytes()
            if command.startswith(b"python3\0-c\0import os, time; own"):
                return int(child)
            if deeper := _descendant(int(child)):
                return deeper
    except OSError:
        pass  # it became another program meanwhile
    return None


def test_its_own_namespaces_may_be_open(sandbox, cell):
    live = cell()
    live("import os\nkept = [os.open('/proc/self/ns/' + name, os.O_RDONLY) for name in os.listdir('/proc/self/ns')]")
    assert red(report(sandbox, live)) == set()


def test_a_frozen_dyno_is_an_answer_and_no_hang(sandbox, cell):
    live = cell()
    state = _cgroup(live, "freezer") / "freezer.state"
    state.write_text("FROZEN")
    try:
        document = report(sandbox, live)
    finally:
        state.write_text("THAWED")
    assert red(document) == set()
    assert "PRV-10" in statuses(document)["unproven"]
    assert live("result = 'alive'") == "alive"


def test_threads_that_chase_each_other_hide_no_missing_filter(sandbox, cell):
    """The first thread of a process without a filter has ended, and the others end as fast as they start."""
    live = cell()
    chase = (
        "import ctypes, threading, time\n"
        "def go():\n    time.sleep(0.002)\n    threading.Thread(target=go).start()\n"
        "threading.Thread(target=go).start()\n"
        "ctypes.CDLL(None).syscall(60, 0)\n"  # exit(2): this thread only
    )
    stranger = subprocess.Popen(["nsenter", "-t", str(live.pid), "-m", "-i", "-n", "-p", "python3", "-c", chase])
    try:
        children = Path(f"/proc/{stranger.pid}/task/{stranger.pid}/children")
        found = wait_for(lambda: children.read_text().split(), 5, "the stranger")
        (_cgroup(live, "pids") / "cgroup.procs").write_text(found[0])
        time.sleep(0.5)
        for _ in range(8):
            assert "PRV-10" in red(report(sandbox, live))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(found[0]), 9)
        stranger.kill()
        stranger.wait()
