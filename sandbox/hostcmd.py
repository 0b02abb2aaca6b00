"""Host programs run through here and nowhere else: argument lists, no shell, fixed PATH and locale, a deadline."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence

from sandbox.errors import HostError
from sandbox.units import escape

# Debian's root PATH. The caller's PATH could name programs of an app's folder.
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ENVIRONMENT = {"PATH": PATH, "LC_ALL": "C.UTF-8", "HOME": "/root"}


def which(program: str) -> str | None:
    """The program's full path on the fixed PATH, or None."""
    for folder in PATH.split(":"):
        path = f"{folder}/{program}"
        if os.access(path, os.X_OK):
            return path
    return None


def require(program: str, package: str) -> str:
    """The program's full path; HostError that names the Debian package otherwise."""
    path = which(program)
    if path is None:
        raise HostError(f"{program} is not installed.", hint=f"apt-get install {package}")
    return path


def spawn(argv: Sequence[str], *, log: str, keep: tuple[int, ...] = (), env: dict[str, str]) -> None:
    """Starts a program that outlives us: a session of its own, no input, both outputs to the file ``log``.

    It is not waited for: when we end, init takes it over.
    """
    with open(log, "ab") as out:
        subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=env,
            cwd="/",
            pass_fds=keep,
            start_new_session=True,
        ).returncode = 0  # nobody collects its status: Popen would warn of that


def run(
    argv: Sequence[str],
    *,
    timeout_s: float = 60.0,
    stdin: bytes = b"",
    check: bool = True,
    env: dict[str, str] | None = None,
    cwd: str | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Runs one program to its end and returns its status and output.

    Raises HostError when it is missing, fails (unless ``check`` is off) or outlives ``timeout_s`` seconds.
    """
    try:
        done = subprocess.run(
            list(argv),
            input=stdin,
            capture_output=True,
            timeout=timeout_s,
            env=env if env is not None else ENVIRONMENT,
            cwd=cwd,
            check=False,
        )
    except FileNotFoundError as error:
        raise HostError(f"{argv[0]} is not installed.", hint="sandbox doctor names what is missing.") from error
    except subprocess.TimeoutExpired as error:
        raise HostError(f"{argv[0]} did not end within {timeout_s:.0f} s.") from error
    if check and done.returncode != 0:
        said = escape(done.stderr.decode("utf-8", "replace").strip().replace("\n", " ⏎ "))[-600:]
        raise HostError(f"{os.path.basename(argv[0])} failed with status {done.returncode}: {said}", details=said)
    return done


def stream(argv: Sequence[str]) -> Iterator[bytes]:
    """What a program writes, in pieces of up to a MiB. It is killed when nobody reads on.

    Raises HostError at its end when it failed.
    """
    with (
        os.fdopen(os.memfd_create("errors"), "w+b") as errors,
        subprocess.Popen(
            list(argv), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, env=ENVIRONMENT, cwd="/"
        ) as process,
    ):
        assert process.stdout is not None  # noqa: S101 - asked for above; for the type checker
        try:
            while piece := process.stdout.read(1 << 20):
                yield piece
            status = process.wait()
        finally:
            process.kill()
        if status:
            errors.seek(0)
            said = escape(errors.read(600).decode("utf-8", "replace").strip().replace("\n", " ⏎ "))
            raise HostError(f"{os.path.basename(argv[0])} failed with status {status}: {said}", details=said)
