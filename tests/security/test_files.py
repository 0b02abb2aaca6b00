"""An app writes to its own folders only, sees no path of the host, and leaves nothing."""

from __future__ import annotations

from tests.conftest import EXAMPLES

WRITES = """
import errno, json, os
def attempt(path):
    try:
        fd = os.open(path, os.O_WRONLY | (0 if os.path.exists(path) else os.O_CREAT)); os.close(fd); return "ok"
    except OSError as e:
        return errno.errorcode[e.errno]
paths = ["/usr/x", "/etc/x", "/etc/passwd", "/etc/hosts", "/bin/sh", "/run/gate/x", "/sys/x", "/var/log/x", "/root/x", "/dev/mqueue/x",
         "/sys/fs/cgroup/memory/memory.limit_in_bytes", "/app/x", "/tmp/x", "/var/tmp/x", "/dev/shm/x", "/dev/null"]
print(json.dumps({p: attempt(p) for p in paths}))
"""
WRITABLE = {"/app/x", "/tmp/x", "/var/tmp/x", "/dev/shm/x", "/dev/null"}


def test_only_its_own_folders_are_writable(sandbox, engine):
    results = sandbox.attack(engine, WRITES)
    assert {path for path, result in results.items() if result == "ok"} == WRITABLE
    assert {result for path, result in results.items() if path not in WRITABLE} <= {"EROFS", "EACCES"}
    # Not for want of rights: the mount itself is read-only.
    assert results["/etc/passwd"] in ("EROFS", "EACCES")


def test_control_a_writable_root_is_writable_for_its_owner(sandbox):
    """Docker, with a root file system that is not read-only and the uid that owns it."""
    code = (
        WRITES.replace("print(", "results = ")
        .replace("}))", "}\nprint(json.dumps(results))")
        .replace("json.dumps({", "{", 1)
    )
    waivers = [f"--waive={clause}" for clause in ("mounts", "uid", "capabilities")]
    results = sandbox.attack("docker", code, *waivers, mutant="rw-root+uid-0+no-root-guard")
    assert results["/usr/x"] == "ok"


PROC = """
import errno, json, os
def attempt(path, flags):
    try:
        fd = os.open(path, flags)
    except OSError as e:
        return errno.errorcode[e.errno]
    try:
        return os.read(fd, 64).hex() if flags == os.O_RDONLY else "opened"
    except OSError as e:
        return errno.errorcode[e.errno]
    finally:
        os.close(fd)
sysctls = []
for folder, _, names in os.walk("/proc/sys"):
    sysctls += [f"{folder}/{n}" for n in names]
written = [p for p in sysctls if attempt(p, os.O_WRONLY) == "opened"]
print(json.dumps({
    "written": written, "tried": len(sysctls),
    "sysrq": attempt("/proc/sysrq-trigger", os.O_WRONLY),
    "kallsyms": attempt("/proc/kallsyms", os.O_RDONLY), "iomem": attempt("/proc/iomem", os.O_RDONLY),
    "cmdline": attempt("/proc/cmdline", os.O_RDONLY), "keys": attempt("/proc/keys", os.O_RDONLY),
    "partitions": attempt("/proc/partitions", os.O_RDONLY), "oom": attempt("/proc/self/oom_score_adj", os.O_WRONLY),
}))
"""


def test_proc_gives_nothing_of_the_host_away_and_takes_no_write(sandbox, engine):
    results = sandbox.attack(engine, PROC)
    assert results["tried"] > 100
    assert results["written"] == []
    assert results["sysrq"] in ("EROFS", "EACCES", "ENOENT")
    for name in ("kallsyms", "iomem", "cmdline", "keys", "partitions"):
        assert results[name] in ("", "ENOENT"), name


def test_control_without_masks_the_kernels_command_line_can_be_read(sandbox, engine):
    results = sandbox.attack(engine, PROC, "--waive", "mounts", mutant="no-mask")
    assert bytes.fromhex(results["cmdline"])
    assert bytes.fromhex(results["partitions"])


MOUNTS = """
import json
print(json.dumps([l.split() for l in open("/proc/self/mountinfo")]))
"""


def test_no_host_path_shows_in_mountinfo(sandbox, engine):
    lines = sandbox.attack(engine, MOUNTS)
    text = "\n".join(" ".join(line) for line in lines if engine == "oci" or line[4] != "/")
    for path in (str(sandbox.state), str(sandbox.run_dir), "/var/lib"):
        assert path not in text


def test_docker_shows_its_own_folder_on_the_root_mount_only(sandbox):
    """What Docker forces: the options of its overlay. Said in SECURITY.md."""
    lines = sandbox.attack("docker", MOUNTS)
    showing = [line[4] for line in lines if "docker/data" in " ".join(line)]
    assert showing == ["/"]


def test_app_changes_vanish_at_the_end(sandbox, engine):
    shell = str(EXAMPLES / "shell")
    first = sandbox("run", "--raw", "-q", "--engine", engine, shell, "--", "sh", "-c", "echo x > /app/mark; ls /app")
    second = sandbox("run", "--raw", "-q", "--engine", engine, shell, "--", "ls", "/app")
    assert first.out.split() == ["mark", "report.sh"]
    assert second.out.split() == ["report.sh"]


def test_another_dynos_files_cannot_be_named(sandbox, engine):
    code = f"""
import json, os
found = []
for path in ({str(sandbox.state)!r}, {str(sandbox.run_dir)!r}, "/var/lib/docker", "/var/run/docker.sock", "/run/sandbox"):
    found += [path] if os.path.exists(path) else []
print(json.dumps(found))
"""
    assert sandbox.attack(engine, code) == []


DEVICES = """
import json, os
found = {}
for folder, _, names in os.walk("/dev"):
    for n in names:
        s = os.lstat(f"{folder}/{n}")
        if s.st_rdev: found[f"{folder}/{n}"] = [os.major(s.st_rdev), os.minor(s.st_rdev)]
print(json.dumps(found))
"""


def test_dev_holds_six_harmless_devices(sandbox, engine):
    found = sandbox.attack(engine, DEVICES)
    expected = {
        "null": [1, 3],
        "zero": [1, 5],
        "full": [1, 7],
        "random": [1, 8],
        "urandom": [1, 9],
        "tty": [5, 0],
        "pts/ptmx": [5, 2],
    }
    assert found == {f"/dev/{name}": numbers for name, numbers in expected.items()}
