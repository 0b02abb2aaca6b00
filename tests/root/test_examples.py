"""The real apps of examples/, on both engines, with their dependencies installed at build."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

from tests.conftest import EXAMPLES, ROOT, lines
from tests.world import PUBLIC


def test_a_flask_app_under_gunicorn_answers(sandbox, engine):
    done = sandbox("run", "--engine", engine, "--get", "/", str(EXAMPLES / "python-web"), timeout=300)
    assert done.status == 0, done
    assert any("Hello from web.1" in line for line in lines(done, "heroku"))
    assert any("Listening at" in line for line in lines(done))
    assert "answered, and was stopped" in done.err


def test_a_node_app_with_a_dependency_answers(sandbox, engine):
    done = sandbox("run", "--engine", engine, "--get", "/", str(EXAMPLES / "node-web"), timeout=300)
    assert done.status == 0, done
    assert any("Hello from web.1, up" in line for line in lines(done, "heroku"))


def test_a_static_binary_runs(sandbox, engine, tmp_path):
    folder = tmp_path / "c-worker"
    shutil.copytree(EXAMPLES / "c-worker", folder)
    subprocess.run(["make", "-s", "-C", str(folder)], check=True)
    done = sandbox("run", "--engine", engine, str(folder), "worker")
    assert done.status == 0, done
    assert lines(done)[0].startswith("static binary, uid ")


def test_a_worker_that_fails_gives_its_status(sandbox, engine):
    done = sandbox("run", "--engine", engine, str(EXAMPLES / "worker"))
    assert done.status == 3
    # One line on stdout, one on stderr: nothing orders two streams.
    assert sorted(lines(done)) == ["job 1 failed: no such table", "working on job 1"]
    assert "exited with status 3" in done.err


def test_a_shell_one_off_with_arguments_and_stdin(sandbox, engine):
    done = sandbox(
        "run", "--raw", "--engine", engine, str(EXAMPLES / "shell"), "--", "./report.sh", "a b", "*", stdin="12345"
    )
    assert done.status == 0
    assert done.out.splitlines() == ["arguments: a b *", "home: /app, memory: 536870912", "5"]


def test_both_engines_look_the_same_to_the_app(sandbox):
    """What an app can see of its surroundings, but for the number of its uid and Docker's own mark."""
    code = """
import json, os, pwd, resource, socket
seen = {
    "env": sorted(os.environ), "cwd": os.getcwd(), "user": pwd.getpwuid(os.getuid()).pw_name,
    "root": sorted(set(os.listdir("/")) - {".dockerenv"}), "etc": sorted(os.listdir("/etc")), "dev": sorted(os.listdir("/dev")),
    "sys": sorted(f"{f}/{n}" for f, _, ns in os.walk("/sys") for n in ns),
    "mounts": sorted((l.split()[4], l.split()[5].split(",")[0]) for l in open("/proc/self/mountinfo") if not l.split()[4].startswith(("/dev/", "/proc/"))),
    "limits": {n: resource.getrlimit(getattr(resource, n)) for n in dir(resource) if n.startswith("RLIMIT_") and n != "RLIMIT_OFILE"},
    "owners": {p: [pwd.getpwuid(os.stat(p).st_uid).pw_name, oct(os.stat(p).st_mode)] for p in ("/", "/usr", "/etc", "/app", "/tmp", "/var/tmp", "/etc/passwd", "/app/report.sh")},
    "shm": os.statvfs("/dev/shm").f_blocks, "disk": [os.statvfs("/tmp").f_blocks, os.statvfs("/tmp").f_files],
    "umask": os.umask(0o77), "pids": sorted(p for p in os.listdir("/proc") if p.isdigit())[:1], "hostname": len(socket.gethostname()),
}
print(json.dumps(seen))
"""
    oci, docker = (sandbox.attack(engine, code) for engine in ("oci", "docker"))
    differing = {key for key in oci if oci[key] != docker[key]}
    assert differing == set(), {key: (oci[key], docker[key]) for key in differing}


def test_the_document_has_what_was_promised(sandbox, engine):
    done = sandbox(
        "run", "--json", "--engine", engine, str(EXAMPLES / "shell"), "--", "sh", "-c", "echo to stderr; exit 5"
    )
    document = json.loads(done.out)
    assert done.status == document["status"] == 5
    assert document["reason"] == "exited"
    assert document["engine"] == engine
    assert len(document["policy_digest"]) == len(document["slug_digest"]) == len(document["stack_digest"]) == 64
    for key in ("memory_peak_bytes", "cpu_us", "pids_peak"):
        assert document[key] > 0, key
    assert {"plan", "slug", "slot", "create", "start", "verify", "run", "teardown"} <= set(document["phases_ms"])
    assert "to stderr" in done.err


def test_a_slug_is_built_once_and_has_one_digest(sandbox, app):
    path = app(Procfile="web: x", **{"run!": "#!/bin/sh\n"})
    first, second = (sandbox("run", "--json", "--engine", "oci", path, "--", "true") for _ in range(2))
    assert "packing the slug" in first.err
    assert "packing the slug" not in second.err
    assert first.json()["slug_digest"] == second.json()["slug_digest"]


def test_a_build_that_fails_says_why_and_leaves_nothing(sandbox, app):
    path = app(Procfile="web: x", **{"requirements.txt": "no-such-package-for-sandbox-tests==1.0\n"})
    done = sandbox("-v", "run", "--engine", "oci", path, timeout=200)
    assert done.status == 125
    assert "the fetch step failed with status" in done.err
    assert "No matching distribution" in done.err


def test_a_build_has_no_network(sandbox, app, world):
    """The app's own build script reaches nobody; what it tries is in the kernel's counters, not at the listener."""
    package = {
        "scripts": {
            "start": "true",
            "build": f"(curl -sS -m 2 http://{PUBLIC}:7009; curl -sS -m 2 http://app.example:7009; true) >/app/said 2>&1",
        }
    }
    path = app(**{"package.json": json.dumps(package)})
    world.listeners.add(world.outside, PUBLIC, 7009)
    world.names.zone["app.example"] = [PUBLIC]
    done = sandbox("run", "--raw", "-q", "--engine", "oci", path, "--", "cat", "/app/said", timeout=200)
    assert "timed out" in done.out, done
    assert "Could not resolve host" in done.out
    assert world.listeners.count(f"tcp {PUBLIC}:7009") == 0
    denied = sandbox("firewall", "denied", "--json").json()["denied"]
    assert ("egress-none", 7009) in {(item["rule"], item["port"]) for item in denied}
    # The control: the same command in a dyno that may.
    command = ("curl", "--http0.9", "-sS", "-m", "2", f"http://{PUBLIC}:7009")
    reached = sandbox("run", "--raw", "-q", "--engine", "oci", path, "--", *command)
    assert reached.out.startswith("hello\n"), reached


def test_the_stack_holds_no_setuid_file_and_matches_its_manifest(sandbox):
    from tests.conftest import default_state

    index = json.loads((default_state() / "stack" / "runtime.json").read_text())
    manifest = json.loads(Path(index["manifest"]).read_text())
    assert not [path for path, entry in manifest.items() if entry["mode"] & 0o6000]
    assert len(manifest) > 5000
    code = """
import hashlib, json, os
out = {}
for p in ("/usr/bin/bash", "/usr/bin/tini", "/usr/bin/python3.11", "/usr/lib/x86_64-linux-gnu/libc.so.6"):
    out[p[1:]] = hashlib.sha256(open(p, "rb").read()).hexdigest()
special = [f"{f}/{n}" for f, _, ns in os.walk("/usr") for n in ns if os.lstat(f"{f}/{n}").st_mode & 0o6000]
print(json.dumps([out, special]))
"""
    hashes, special = sandbox.attack("oci", code)
    assert hashes == {path: manifest[path]["sha256"] for path in hashes}
    assert special == []


def test_the_readme_names_commands_that_exist():
    text = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in ("run", "test", "install", "bench"):
        assert f"\n{target}:" in makefile
    assert "make run" in text
    assert "make test" in text
