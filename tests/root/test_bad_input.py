"""Every kind of bad input ends with a clear error, the next action, the right code, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import EXAMPLES, ROOT, census, default_state, make_instance

SHELL = str(EXAMPLES / "shell")


@pytest.fixture(scope="module")
def bad(home, docker_host):
    instance = make_instance(home, "bad", docker_host)
    yield instance
    assert census(instance) == []


def refuse(instance, *arguments: str, code: int = 125, says: str, hint: str = "", **more) -> None:
    done = instance("run", *arguments, **more)
    assert done.status == code, done
    assert "Traceback" not in done.err
    assert done.err.splitlines()[-1 if not hint else -2].startswith(("Error: ", "Hint: "))
    assert says in done.err, done.err
    assert hint in done.err, done.err
    if "--json" in arguments:
        document = json.loads(done.out)
        assert (document["status"], document["reason"]) == (code, "not-started")
        assert says in document["error"]
    else:
        assert done.out == ""
    assert census(instance) == []


def test_paths_and_apps(bad, app, tmp_path):
    refuse(bad, "/no/such/app", says="/no/such/app does not exist", hint="sandbox run PATH")
    refuse(bad, app(file="x") + "/file", says="is a file, not an app's folder", hint="sandbox run")
    (tmp_path / "empty").mkdir()
    refuse(bad, str(tmp_path / "empty"), says="is empty", hint="put the app's files")
    refuse(bad, app(readme="x"), says="no Procfile and no obvious command", hint="echo 'web: ./serve'")


def test_a_procfile_error_names_file_and_line(bad, app):
    refuse(bad, app(Procfile="web: x\nworker ./y\n"), says="Procfile:2:", hint="write <process type>: <command>")


def test_an_unknown_process_type_lists_those_there_are(bad, app):
    refuse(
        bad,
        app(Procfile="web: x\nworker: y\n"),
        "clock",
        code=2,
        says='no process type "clock"',
        hint="process types: web, worker",
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--size", "huge"], 'no dyno size "huge"'),
        (["--memory", "512X"], '--memory "512X" is not a size'),
        (["--memory", "0"], "--memory must be more than zero"),
        (["--memory", "-5M"], "is not a size"),
        (["--memory", "2G"], "--memory 2 GiB is not between 16 MiB and the 512 MiB of size standard-1x"),
        (["--size", "performance-2xl"], "needs 126 GiB of memory, this host has"),
        (["--pids", "0"], "--pids 0 is not between"),
        (["--cpus", "99"], "--cpus 99 is not between"),
        (["--timeout", "soon"], '--timeout "soon" is not a duration'),
        (["--env", "NOEQUALS"], "--env: there is no = in it"),
        (["--env", "1X=y"], '--env: "1X" is not a variable name'),
        (["--env", "X=" + "y" * 70000], "have more than 65536 bytes"),
        (["--env-file", "/no/such/file"], '--env-file "/no/such/file" cannot be read'),
        (["--env-file", "/etc"], "cannot be read"),
        (["--engine", "podman"], 'no engine "podman"'),
        (["--runtime", "kata"], 'no runtime "kata"'),
        (["--engine", "docker", "--runtime", "runsc"], "goes with --engine oci"),
        (["--waive", "everything"], 'no clause "everything"'),
        (["--raw", "--json"], "both want stdout"),
        (["--get", "nopath"], "is not a path"),
        (["--tty"], "--tty needs a terminal"),
    ],
)
def test_options(bad, options, says):
    refuse(bad, *options, SHELL, "--", "true", code=2, says=says)


def test_an_env_file_names_its_line_and_never_shows_a_value(bad, tmp_path):
    file = tmp_path / ".env"
    file.write_text("# comment\nA=1\nexport B=2\nSECRET_WITHOUT_EQUALS\n")
    refuse(bad, "--env-file", str(file), SHELL, "--", "true", code=2, says=f"{file}:4: there is no = in it")
    done = bad("run", "--raw", "-q", "--env-file", str(file), SHELL, "--", "true")
    assert "SECRET_WITHOUT" not in done.err


def test_env_reaches_the_app_and_nothing_else_does(bad, tmp_path):
    file = tmp_path / ".env"
    file.write_text("A=from file\nB=file\n")
    code = "import json, os; print(json.dumps(dict(os.environ)))"
    value = 'it\'s "quoted" $HOME `id` \\ end'
    done = bad(
        "run",
        "--raw",
        "-q",
        "--env-file",
        str(file),
        "--env",
        "B=flag",
        "--env",
        f"C={value}",
        SHELL,
        "--",
        "python3",
        "-c",
        code,
        HOSTVAR="leak",
    )
    env = json.loads(done.out)
    assert (env["A"], env["B"], env["C"]) == ("from file", "flag", value)
    assert env["HOME"] == "/app"
    assert env["DYNO"].startswith("run.")
    assert set(env) <= {
        "A",
        "B",
        "C",
        "DYNO",
        "HOME",
        "PATH",
        "LANG",
        "PYTHONUNBUFFERED",
        "MEMORY_AVAILABLE",
        "WEB_CONCURRENCY",
        "PS1",
        "PWD",
        "SHLVL",
        "_",
        "OLDPWD",
    }


def test_a_preloaded_library_meets_the_wall_not_the_gate(bad, app):
    """A config var that would run code in every process must not run any before the verdict."""
    refuse(
        bad,
        "--env",
        "LD_PRELOAD=/app/evil.so",
        app(run="x"),
        "--",
        "true",
        mutant="no-oom-score",
        says="oom-score: promised",
    )


def test_not_root(home):
    python = [sys.executable, "-c", "from sandbox.cli.entry import main; main()"]
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/python3", "-c",
         f"import sys; sys.path[:0] = {[str(ROOT), *[p for p in sys.path if 'site-packages' in p]]!r}; sys.argv = ['sandbox', 'run', '/tmp', '--', 'true']\n" + python[2]],
        capture_output=True, text=True, check=False, cwd="/",
    )  # fmt: skip
    if "ModuleNotFoundError" in done.stderr or "PermissionError" in done.stderr:
        # This checkout lies where only root can read: the same check, without starting anything.
        pid = os.fork()
        if pid == 0:
            os.setresuid(65534, 65534, 65534)
            from sandbox.cli.main import run_cli

            os._exit(run_cli(["run", "/tmp", "--", "true"]))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
        return
    assert done.returncode == 2, done
    assert "needs root" in done.stderr


def test_a_missing_stack_image(home, tmp_path):
    instance = make_instance(home, "nostack")
    (instance.state / "stack").unlink()
    refuse(
        instance,
        "--engine",
        "oci",
        SHELL,
        "--",
        "true",
        says="stack image is not built yet",
        hint="sandbox stack build",
    )


def test_an_altered_stack_image_is_not_used(home):
    instance = make_instance(home, "altered")
    (instance.state / "stack").unlink()
    stack = instance.state / "stack"
    stack.mkdir(mode=0o700)
    index = json.loads((default_state() / "stack" / "runtime.json").read_text())
    image = stack / "copy.squashfs"
    shutil.copyfile(index["image"], image)
    index["image"] = str(image)
    (stack / "runtime.json").write_text(json.dumps(index))
    done = instance("run", "--raw", "-q", "--engine", "oci", SHELL, "--", "echo", "as built")
    assert done.out == "as built\n", done  # another file, but the same bytes: hashed once, then used
    with image.open("r+b") as file:
        file.seek(50_000_000)
        file.write(b"altered")
    refuse(instance, "--engine", "oci", SHELL, "--", "true", says="was altered: expected SHA256:", hint="--force")


def test_an_altered_slug_is_r17(home):
    instance = make_instance(home, "slug")
    assert instance("run", "-q", "--raw", "--engine", "oci", SHELL, "--", "true").status == 0
    image = next((instance.state / "slugs").glob("*.squashfs"))
    image.chmod(0o600)
    with image.open("r+b") as file:
        file.seek(100)
        file.write(b"altered")
    refuse(instance, "--engine", "oci", SHELL, "--", "true", says="Error R17 (Checksum error)", hint="remove")


def test_a_full_disk(home, app):
    """The state directory on a file system of 48 MiB: no room for a dyno's disk."""
    instance = make_instance(home, "full")
    (instance.state / "stack").unlink()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m,mode=711", "tmpfs", str(instance.state)], check=True)
    try:
        (instance.state / "stack").symlink_to(default_state() / "stack")
        (instance.state / "fill").write_bytes(b"x" * (40 << 20))
        done = instance("run", "--engine", "oci", SHELL, "--", "true")
        assert done.status == 125
        assert "Traceback" not in done.err
        assert "a dyno needs 32 MiB to start" in done.err or "failed with status" in done.err
        assert "Hint: " in done.err
        assert census(instance) == []
    finally:
        subprocess.run(["umount", str(instance.state)], check=True)


def test_no_docker_socket(home):
    instance = make_instance(home, "nodocker", "unix:///no/such/docker.sock")
    refuse(
        instance,
        "--engine",
        "docker",
        SHELL,
        "--",
        "true",
        says="no Docker socket at /no/such/docker.sock",
        hint="--docker-host",
    )


def test_no_runtime(home):
    instance = make_instance(home, "noruntime")
    refuse(
        instance,
        "--engine",
        "oci",
        SHELL,
        "--",
        "true",
        mutant="no-runtime",
        says="no OCI runtime is installed",
        hint="apt-get install runc conmon",
    )


def test_hostile_names_are_shown_escaped(bad, tmp_path):
    folder = tmp_path / "app"
    folder.mkdir()
    (folder / "a\x1b]0;owned\x07b").write_text("")
    refuse(bad, str(folder), "--", "true", says=r"\x1b]0;owned\x07")


def test_ten_thousand_times_ten_files(bad, tmp_path):
    folder = tmp_path / "many"
    for part in range(100):
        (folder / str(part)).mkdir(parents=True)
        for number in range(1000):
            (folder / str(part) / str(number)).touch()
    refuse(bad, str(folder), "--", "true", says="more than 50000 files and folders", hint=".slugignore")


def test_a_web_process_that_never_binds_is_r10(bad, app):
    done = bad("run", "--boot-timeout", "1s", app(Procfile="web: sleep 60"))
    assert done.status == 137
    assert "Error R10 (Boot timeout) -> Web process failed to bind to $PORT within 1 seconds of launch" in done.out
    assert census(bad) == []


def test_ps_gc_and_doctor(bad):
    assert bad("ps", "--json").out.strip() == "[]"
    assert bad("gc").out == "Nothing was left behind.\n"
    done = bad("doctor", "--json")
    document = done.json()
    assert document["summary"]["missing"] == 0, [f for f in document["findings"] if f["verdict"] == "missing"]
    assert {"root", "programs", "engine oci", "cgroups", "kernel", "stack", "switches"} <= {
        f["topic"] for f in document["findings"]
    }


def test_closed_descriptors_never_take_the_apps_output_for_ours(bad):
    """With stdin, stdout or stderr closed, a socket of ours would get that number and the app's bytes with it."""
    command = bad.argv(
        "run", "--raw", "--engine", "docker", SHELL, "--", "sh", "-c", "echo out; echo INJECTED >&2; exit 3"
    )
    for closed in ("<&-", ">&-", "2>&-", "<&- >&-", "<&- 2>&-", "<&- >&- 2>&-"):
        done = subprocess.run(
            ["bash", "-c", f'exec "$@" {closed}', "bash", *command],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 3, (closed, done)
        assert done.stdout == ("" if " >&-" in f" {closed}" else "out\n"), closed
    assert census(bad) == []


def test_a_slow_reader_gets_every_line(bad):
    """The reader looks away for a while after the app has ended."""
    command = bad.argv("run", "--raw", "-q", "--engine", "oci", SHELL, "--", "seq", "300000")
    done = subprocess.run(
        ["bash", "-c", '"$@" | (sleep 8; wc -l)', "bash", *command],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == "300000"


def test_a_terminal_that_nobody_reads_does_not_stop_the_clock(bad):
    """A full pseudo-terminal would block a plain write; the timeout must come all the same."""
    import pty
    import time

    main, other = pty.openpty()
    begin = time.monotonic()
    argv = bad.argv(
        "run", "--timeout", "2s", "--grace", "1s", "--engine", "oci", SHELL, "--", "sh", "-c", "yes; sleep 60"
    )
    process = subprocess.Popen(argv, stdout=other, stderr=subprocess.PIPE)
    os.close(other)
    # The app's end is decided by the clock; only then is the terminal read, and the rest delivered.
    from tests.conftest import wait_for

    wait_for(lambda: time.monotonic() - begin > 1 and not bad_dynos(bad), 30, "the end of the dyno")
    while True:
        try:
            if not os.read(main, 65536):
                break
        except OSError:
            break
    os.close(main)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 124, err
    assert b"our timeout of 2 s" in err


def bad_dynos(instance) -> list[int]:
    """Processes that live in the instance's dynos."""
    from sandbox.host.cgroup import Cgroup

    journals = (instance.state / "journal").glob("*.jsonl") if (instance.state / "journal").exists() else ()
    return [pid for path in journals for pid in Cgroup.at(f"/{path.stem}").pids()] or (
        [1] if not list((instance.state / "journal").glob("*")) else []
    )


def test_a_get_without_an_answer_is_a_failure(bad, app):
    mute = "import os,signal,socket,sys,time\nsignal.signal(15, lambda *_: sys.exit(0))\ns=socket.socket(); s.bind(('',int(os.environ['PORT']))); s.listen()\nc,_=s.accept(); c.close(); time.sleep(60)"
    done = bad("run", "--get", "/", app(**{"Procfile": "web: exec python3 mute.py", "mute.py": mute}))
    assert done.status == 1, done
    assert "did not answer GET /" in done.err


def test_a_failed_build_shows_its_own_lines(bad, app):
    package = {"scripts": {"start": "true", "build": "echo the reason why >&2; exit 3"}}
    done = bad("run", app(**{"package.json": json.dumps(package)}), "--", "true", timeout=120)
    assert done.status == 125
    assert "the reason why" in done.err
    assert "the build step failed with status" in done.err


def test_drafts_of_dead_makers_are_swept(bad):
    slugs = bad.state / "slugs"
    slugs.mkdir(exist_ok=True)
    (slugs / ".work.4194999.x").mkdir()
    (slugs / f".key.{os.getpid()}").write_text("alive")
    done = bad("gc")
    assert ".work.4194999.x" in done.out
    assert (slugs / f".key.{os.getpid()}").exists()
    (slugs / f".key.{os.getpid()}").unlink()


def test_nohup_is_honoured(bad):
    """A hang-up that our caller ignores does not stop the dyno."""
    import signal

    argv = bad.argv("run", "--raw", "-q", "--engine", "oci", SHELL, "--", "sh", "-c", "echo up; sleep 2; echo end")
    process = subprocess.Popen(
        ["nohup", *argv], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
    )
    assert process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGHUP)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, b"end\n")


def test_a_device_in_the_app_is_refused(bad, app):
    path = app(Procfile="web: x")
    os.mknod(f"{path}/null", 0o020666, os.makedev(1, 3))
    refuse(bad, path, says='"null" is a device', hint="remove it")
