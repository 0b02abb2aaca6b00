"""A hostile program tries to become somebody else, or to gain a right."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.conftest import EXAMPLES

WHO = """
import json, os
status = dict(l.split(":", 1) for l in open("/proc/self/status"))
print(json.dumps({
    "uid": os.getresuid(), "gid": os.getresgid(), "groups": os.getgroups(),
    "caps": [int(status[k], 16) for k in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")],
    "nnp": status["NoNewPrivs"].strip(), "map": open("/proc/self/uid_map").read().split(),
}))
"""


def test_it_runs_as_an_unprivileged_id_with_nothing(sandbox, engine):
    who = sandbox.attack(engine, WHO)
    uid = who["uid"][0]
    assert who["uid"] == [uid] * 3 == who["gid"]
    assert set(who["groups"]) <= {uid}
    assert who["caps"] == [0] * 5
    assert who["nnp"] == "1"
    if engine == "oci":
        assert uid == 1000
        assert who["map"][0] == "0"
        assert int(who["map"][1]) >= 0x70000000
        assert who["map"][2:] == ["65536"]
    else:
        assert uid >= 0x70000000


def test_no_two_runs_have_the_same_ids(sandbox):
    """Ranges are taken from a random place among 4096."""
    ids = {sandbox.attack("docker", WHO)["uid"][0] for _ in range(4)}
    assert len(ids) > 1


BECOME = """
import ctypes, errno, json, os
def attempt(f, *a):
    try:
        f(*a); return "ok"
    except OSError as e:
        return errno.errorcode[e.errno]
libc = ctypes.CDLL(None, use_errno=True)
def capset():
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)(*[0xFFFFFFFF] * 6)
    if libc.capset(header, data) < 0: raise OSError(ctypes.get_errno(), "")
import resource
print(json.dumps({
    "setuid": attempt(os.setuid, 0), "setgid": attempt(os.setgid, 0), "setgroups": attempt(os.setgroups, [0]), "capset": attempt(capset),
    "nice": attempt(os.nice, -5), "fifo": attempt(os.sched_setscheduler, 0, os.SCHED_FIFO, os.sched_param(1)),
    "chown": attempt(os.chown, "/etc/passwd", 1000, 1000), "oom": attempt(lambda: os.write(os.open("/proc/self/oom_score_adj", os.O_WRONLY), b"-1000")),
    "core": resource.getrlimit(resource.RLIMIT_CORE)[1],
}))
"""


def test_it_cannot_become_root_or_raise_itself(sandbox, engine):
    got = sandbox.attack(engine, BECOME)
    assert got["core"] == 0
    for name in ("setuid", "setgid", "capset"):
        # setgid(0) may be EINVAL where the id is not mapped; never ok.
        assert got[name] in ("EPERM", "EINVAL"), name
    assert got["setgroups"] == "EPERM"
    assert got["nice"] in ("EPERM", "EACCES")
    assert got["fifo"] == "EPERM"
    assert got["chown"] in ("EPERM", "EROFS")
    assert got["oom"] == "EACCES"


def test_control_root_of_the_container_can(sandbox):
    """With uid 0 and capabilities inside (Docker): the same calls succeed, so they can."""
    waivers = [f"--waive={c}" for c in ("uid", "capabilities", "mounts")]
    got = sandbox.attack("docker", BECOME, *waivers, mutant="uid-0+all-caps")
    assert [got[name] for name in ("setuid", "setgid", "setgroups")] == ["ok"] * 3


SETUID = r"""
#include <unistd.h>
#include <stdio.h>
int main(void) { printf("%d %d\n", (int)getuid(), (int)geteuid()); return 0; }
"""


@pytest.fixture(scope="module")
def helper(tmp_path_factory):
    """A slug of our own making with a root-owned setuid binary in it: what our packing would never let through."""
    folder = tmp_path_factory.mktemp("setuid")
    (folder / "h.c").write_text(SETUID)
    subprocess.run(["cc", "-static", "-o", folder / "helper", folder / "h.c"], check=True)
    return folder / "helper"


def test_a_setuid_file_of_an_app_loses_its_bit(sandbox, engine, app, helper):
    import shutil
    from pathlib import Path

    path = app(Procfile="web: x")
    shutil.copy(helper, f"{path}/helper")
    Path(f"{path}/helper").chmod(0o6755)
    done = sandbox("run", "--raw", "-q", "--engine", engine, path, "--", "sh", "-c", "stat -c %a helper; ./helper")
    mode, ids = done.out.splitlines()
    assert mode == "755"
    assert len(set(ids.split())) == 1


def test_a_setuid_file_that_got_in_gives_no_rights(sandbox, engine, app, helper):
    """Two layers left: nosuid on every mount and no-new-privileges."""
    import shutil
    from pathlib import Path

    path = app(Procfile="web: x")
    shutil.copy(helper, f"{path}/helper")
    Path(f"{path}/helper").chmod(0o755)
    command = ("run", "--raw", "-q", "--engine", engine, path, "--", "sh", "-c", "stat -c %a helper; ./helper")
    walled = sandbox(*command, mutant="setuid-slug")
    assert walled.out.splitlines()[0] == "4755", walled
    assert len(set(walled.out.splitlines()[1].split())) == 1
    waived = ("run", "--waive=no-new-privileges", "--waive=mounts", *command[1:])
    control = sandbox(*waived, mutant="setuid-slug+no-nnp+suid-mounts")
    real, effective = control.out.splitlines()[1].split()
    assert real != effective, "without nosuid and no-new-privileges the same file gives another id"


def test_secrets_are_on_no_command_line_and_on_no_disk(sandbox, engine):
    """Read from the host while it runs: argv of every process, and every file of the slot and the engine."""
    import os
    from pathlib import Path

    secret = "s3cr3t-" + os.urandom(8).hex()
    process = sandbox.start(
        "run", "--raw", "-q", "--engine", engine, "--env-file", "/dev/stdin", str(EXAMPLES / "shell"), "--",
        "sh", "-c", "echo up; sleep 5", stdin=subprocess.PIPE,
    )  # fmt: skip
    process.stdin.write(f"TOKEN={secret}\n".encode())
    process.stdin.close()
    process.stdin = None
    assert process.stdout.readline() == b"up\n"
    found = []
    for name in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if secret.encode() in name.read_bytes():
                found.append(str(name))
        except OSError:
            continue
    roots = [
        sandbox.run_dir,
        sandbox.state / "journal",
        Path(sandbox.docker_host.removeprefix("unix://")).parent / "data" / "containers",
    ]
    for root in roots:
        grep = subprocess.run(["grep", "-rslD", "skip", secret, str(root)], capture_output=True, text=True, check=False)
        found += grep.stdout.split()
    process.communicate(timeout=60)
    assert found == []
    assert re.fullmatch(r"s3cr3t-[0-9a-f]{16}", secret)
