"""Writing until nothing goes: bytes and files both end inside, and the host does not notice."""

from __future__ import annotations

import os

from tests.conftest import census, lines

FILL = """
import errno, json, os
def fill(path):
    n = 0
    try:
        with open(path, "wb", buffering=0) as f:
            while True:
                n += f.write(b"x" * 1048576)
    except OSError as e:
        return [n, errno.errorcode[e.errno]]
os.makedirs("/tmp/a", exist_ok=True)
first = fill("/tmp/a/fill")
os.unlink("/tmp/a/fill")
second = fill("/app/fill")
os.unlink("/app/fill")
third = fill("/var/tmp/fill")
print(json.dumps([first, second, third]))
"""

INODES = """
import errno, json, os
os.mkdir("/tmp/many")
n = 0
try:
    while n < 20000:
        os.close(os.open(f"/tmp/many/{n}", os.O_CREAT | os.O_WRONLY)); n += 1
    print(json.dumps([n, None]))
except OSError as e:
    print(json.dumps([n, errno.errorcode[e.errno]]))
"""
MIB = 1024 * 1024


def free(path) -> int:
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def test_bytes_end_in_enospc_everywhere_and_the_host_keeps_its_space(sandbox, engine):
    before = free(sandbox.state)
    # RLIMIT_FSIZE has the same value: a file of its own cannot reach it before the disk is full.
    for size, error in sandbox.attack(engine, FILL, "--disk", "64M"):
        assert error == "ENOSPC"
        assert 55 * MIB <= size <= 64 * MIB
    assert before - free(sandbox.state) < 32 * MIB


def test_inodes_end_in_enospc(sandbox, engine):
    created, error = sandbox.attack(engine, INODES, "--disk", "64M")
    assert error == "ENOSPC"
    assert 3500 < created <= 4600


def test_control_without_the_image_more_bytes_and_files_fit(sandbox, engine):
    waive = ("--waive", "disk", "--waive", "mounts")
    created, error = sandbox.attack(engine, INODES, "--disk", "64M", *waive, mutant="no-quota")
    assert (created, error) == (20000, None)
    code = FILL.replace("while True", "while n < 100 * 1048576").replace("return [n, errno", "return [n, errno")
    code = code.replace("    except OSError as e:", "        return [n, None]\n    except OSError as e:")
    results = sandbox.attack(engine, code, "--disk", "64M", *waive, "--waive", "rlimits", mutant="no-quota+no-rlimits")
    assert results[0] == [100 * MIB, None]


def test_reserving_and_huge_sparse_files_end_too(sandbox, engine):
    code = """
import errno, json, os
def attempt(f):
    try:
        f(); return "ok"
    except OSError as e:
        return errno.errorcode[e.errno]
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
fd = os.open("/tmp/big", os.O_CREAT | os.O_WRONLY)
print(json.dumps([attempt(lambda: os.posix_fallocate(fd, 0, 1 << 40)), attempt(lambda: os.ftruncate(fd, 1 << 40))]))
"""
    assert sandbox.attack(engine, code) == ["EFBIG", "EFBIG"]


def test_what_was_written_is_reported(sandbox, engine, app):
    path = app(run="x")
    done = sandbox(
        "run",
        "--json",
        "--engine",
        engine,
        path,
        "--",
        "sh",
        "-c",
        "head -c 5000000 /dev/zero > /app/f; touch /tmp/a /tmp/b",
    )
    document = done.json()
    assert 5_000_000 <= document["disk_written_bytes"] < 5_200_000
    assert document["disk_written_inodes"] == 3


def test_descriptors_end_at_the_limit(sandbox, engine):
    code = """
import errno, json, os
n = 0
try:
    while n < 30000:
        os.open("/dev/null", os.O_RDONLY); n += 1
except OSError as e:
    print(json.dumps([n, errno.errorcode[e.errno]]))
"""
    opened, error = sandbox.attack(engine, code)
    assert error == "EMFILE"
    assert 9990 <= opened < 10000


def test_control_without_rlimits_more_descriptors_open(sandbox, engine):
    code = "import json, os\nfor n in range(12000): os.open('/dev/null', 0)\nprint(json.dumps(n))"
    assert sandbox.attack(engine, code, "--waive", "rlimits", mutant="no-rlimits") == 11999


def test_a_gigabyte_of_output_passes_and_fills_nothing(sandbox, engine, app):
    """Through a pipe that counts: every byte arrives, our memory stays, the host's disk stays."""
    import subprocess

    before = free(sandbox.state)
    process = sandbox.start(
        "run", "--raw", "-q", "--engine", engine, app(run="x"), "--", "head", "-c", str(1 << 30), "/dev/zero"
    )
    count = subprocess.run(["wc", "-c"], stdin=process.stdout, capture_output=True, check=True).stdout
    assert process.wait(120) == 0, process.stderr.read()
    process.stdout.close(), process.stderr.close()
    assert int(count) == 1 << 30
    assert before - free(sandbox.state) < 64 * MIB
    assert census(sandbox) == []


def test_lines_without_end_are_cut(sandbox, engine, app):
    done = sandbox("run", "--engine", engine, app(run="x"), "--", "sh", "-c", "head -c 25000 /dev/zero | tr '\\0' a")
    assert [len(line) for line in lines(done)] == [10000, 10000, 5000]
