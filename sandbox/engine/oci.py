"""The embedded engine: an OCI runtime (runc, crun, runsc) held by conmon. No daemon.

conmon starts the runtime, holds the container's input and output and writes its exit status to a file. It survives
us; if it is killed, the container lives on without an exit status, and we say so instead of inventing one.
"""

from __future__ import annotations

import glob
import json
import os
import select
import subprocess
import time
from typing import Any

from sandbox import hostcmd
from sandbox.config import Config
from sandbox.engine.base import Attachment, Container
from sandbox.errors import EngineError, HostError
from sandbox.host import cgroup
from sandbox.policy import oci
from sandbox.policy.clauses import Clause
from sandbox.policy.spec import ContainerSpec
from sandbox.units import escape

RUNTIMES = ("runc", "crun", "runsc")
_CREATE_TIMEOUT_S = 60.0
# gVisor's file server opens no FIFO of the host unless told, and the gate is one. Without the network flag it wants
# to take over the interfaces of the host's namespace.
_GVISOR_FLAGS = ("--host-fifo=open", "--network=none")
# What the host sees of such a dyno is gVisor's kernel and file server: their ids, namespaces and descriptors.
_GVISOR_HIDES = (
    *(Clause.UID, Clause.CAPABILITIES, Clause.SECCOMP, Clause.NAMESPACES, Clause.MOUNTS, Clause.DEVICES),
    *(Clause.RLIMITS, Clause.OOM_SCORE, Clause.DESCRIPTORS, Clause.LABEL),
)
_FIFO = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC


class OciEngine:
    """One OCI runtime with conmon as its shim."""

    name = "oci"
    brings_mounts = False

    def __init__(self, config: Config, runtime: str) -> None:
        self._config = config
        self.runtime = runtime
        # runsc makes user namespaces of its own and cannot join ours.
        self.user_namespaces = runtime != "runsc"
        self.networked = runtime != "runsc"
        self._flags = [f"--root={config.runtime_dir}", *(_GVISOR_FLAGS if runtime == "runsc" else ())]
        self._runtime_path = hostcmd.require(runtime, runtime)
        self._conmon = hostcmd.require("conmon", "conmon")
        self._conmons: dict[str, int] = {}

    def version(self) -> str:
        first = hostcmd.run([self._runtime_path, "--version"]).stdout.decode("utf-8", "replace").splitlines()
        shim = hostcmd.run([self._conmon, "--version"]).stdout.decode("utf-8", "replace").splitlines()
        return escape(f"{first[0] if first else self.runtime}, {shim[0] if shim else 'conmon'}")

    def missing(self) -> dict[Clause, str]:
        if self.runtime == "runsc":
            return dict.fromkeys(
                _GVISOR_HIDES, "gVisor keeps it inside a kernel of its own, where the host cannot read it"
            )
        if self.runtime == "crun" and not cgroup.unified():
            return dict.fromkeys((Clause.MEMORY, Clause.PIDS, Clause.CPU), "crun needs the unified cgroup hierarchy")
        return {}

    def prepare(self, stack_digest: str, stack_root: str) -> str:
        return stack_digest

    def document(self, spec: ContainerSpec) -> dict[str, object]:
        """The content of the bundle's config.json."""
        return oci.config(spec)

    def create(self, spec: ContainerSpec, folder: str) -> Container:
        bundle, exits = f"{folder}/bundle", f"{folder}/exit"
        os.mkdir(bundle, 0o711)
        os.mkdir(exits, 0o700)
        with open(f"{bundle}/config.json", "w", encoding="utf-8") as file:
            # dumps, not dump: only the former uses the C encoder (1 ms instead of 10).
            file.write(json.dumps(self.document(spec)))
        argv = [
            *(hostcmd.require("prlimit", "util-linux"), *oci.shim_limits(spec.policy), "--", self._conmon),
            *("--api-version", "1", "-c", spec.container_id, "-u", spec.container_id, "-n", spec.container_id),
            *(
                "-r",
                self._runtime_path,
                "-b",
                bundle,
                "-p",
                f"{folder}/pid",
                "--conmon-pidfile",
                f"{folder}/conmon.pid",
            ),
            *("--exit-dir", exits, "--socket-dir-path", folder, "--full-attach", "-l", "none", "--log-level", "error"),
            *(word for flag in (*self._flags, *self._log(folder)) for word in ("--runtime-arg", flag)),
            *(("-t",) if spec.tty else ()),
            *(("-i",) if spec.stdin else ()),
        ]
        pid = self._spawn(argv, folder)
        try:
            with open(f"{folder}/conmon.pid", encoding="ascii") as file:
                self._conmons[spec.container_id] = os.pidfd_open(int(file.read()))
        except (OSError, ValueError) as error:
            raise EngineError("conmon ended before the container was made.", hint="sandbox doctor") from error
        return Container(spec.container_id, pid)

    def _log(self, folder: str) -> tuple[str, ...]:
        # conmon gives runc the container's stderr: what runc 1.1.10 warns of (a user namespace by path and by mapping,
        # which 1.1.5 demands) would stand in the app's own output. A fatal error is still said there.
        return (f"--log={folder}/runc.log",) if self.runtime == "runc" else ()

    def _spawn(self, argv: list[str], folder: str) -> int:
        """Runs conmon up to the moment where it says on its sync pipe that the container exists."""
        read_end, write_end = os.pipe()
        try:
            with open(f"{folder}/conmon.log", "wb") as log:
                process = subprocess.Popen(
                    argv,
                    # runc lives for 50 ms and needs no garbage collector; conmon hands its environment on to it.
                    env={**hostcmd.ENVIRONMENT, "_OCI_SYNCPIPE": str(write_end), "GOGC": "off"},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(write_end,),
                    cwd="/",
                )
            os.close(write_end)
            write_end = -1
            answer = _read_line(read_end, _CREATE_TIMEOUT_S)
            process.wait(timeout=_CREATE_TIMEOUT_S)
        except FileNotFoundError as error:
            raise EngineError("conmon is not installed.", hint="apt-get install conmon") from error
        finally:
            os.close(read_end)
            if write_end >= 0:
                os.close(write_end)
        try:
            message: dict[str, Any] = json.loads(answer)
            pid = int(message["data"])
        except (ValueError, KeyError, TypeError) as error:
            raise EngineError("conmon ended without an answer.", details=_tail(f"{folder}/conmon.log")) from error
        if pid <= 0:
            said = escape(str(message.get("message", "")).strip()) or _tail(f"{folder}/conmon.log")
            raise EngineError(f"{self.runtime} did not make the container: {said}", hint="sandbox doctor", details=said)
        return pid

    def attach(self, container: Container) -> Attachment:
        from sandbox.engine.conmon import ConmonAttachment  # loaded while the runtime works

        return ConmonAttachment(f"{self._config.dynos_dir}/{container.container_id}/bundle")

    def start(self, container: Container) -> Container:
        """Lets init run.

        runc's ``start`` reads one byte from the FIFO on which its init waits, and takes 8 ms for it; we read that
        byte ourselves. Another runtime gets its command: crun has such a FIFO, too, and its init is the one that reads.
        """
        if self.runtime != "runc":
            self._start_by_command(container)
            return container
        fifo = os.open(f"{self._config.runtime_dir}/{container.container_id}/exec.fifo", _FIFO)
        try:
            poller = select.poll()
            poller.register(fifo, select.POLLIN)
            if not poller.poll(_CREATE_TIMEOUT_S * 1000) or not os.read(fifo, 1):
                raise EngineError("the container's init ended before it was started.", hint="sandbox doctor")
        finally:
            os.close(fifo)
        return container

    def _start_by_command(self, container: Container) -> None:
        try:
            self._run("start", container.container_id)
        except HostError as error:
            raise EngineError(f"the container did not start: {error.message}", details=error.details) from error

    def _run(self, *arguments: str, check: bool = True) -> None:
        hostcmd.run([self._runtime_path, *self._flags, *arguments], check=check)

    def signals_itself(self, container: Container, number: int) -> bool:
        if self.runtime != "runsc":
            return False
        # The processes in the cgroup are gVisor's own: its kernel and its file server.
        self._run("kill", "--all", container.container_id, str(number), check=False)
        return True

    def exit_status(self, container: Container, *, timeout_s: float) -> int | None:
        path = f"{self._config.dynos_dir}/{container.container_id}/exit/{container.container_id}"
        shim = self._conmons.get(container.container_id, -1)
        deadline = time.monotonic() + timeout_s
        while True:
            # Looked at before the file: conmon writes the status, then ends.
            shim_ended = shim < 0 or bool(select.select([shim], [], [], 0)[0])
            try:
                with open(path, encoding="ascii") as file:
                    text = file.read().strip()
                if text:
                    return int(text)
            except FileNotFoundError:
                pass
            if shim_ended or time.monotonic() > deadline:
                return None
            select.select([shim], [], [], 0.005)

    def lost(self, container: Container) -> bool:
        shim = self._conmons.get(container.container_id, -1)
        return shim < 0 or bool(select.select([shim], [], [], 0)[0])

    def destroy(self, container_id: str, folder: str) -> None:
        state = f"{self._config.runtime_dir}/{container_id}"
        shim = self._conmons.pop(container_id, -1)
        if shim >= 0:
            # conmon ends by itself once it wrote the exit status; its runtime child must not outlive it half-way.
            select.select([shim], [], [], 5.0)
            os.close(shim)
        if self.runtime == "runsc":
            # Its kernel and its file server are processes of their own; its state is files beside the others'.
            self._run("delete", "--force", container_id, check=False)
            for path in glob.glob(f"{state}_sandbox:*"):
                os.unlink(path)
        if not os.path.isdir(state):
            return
        # For runc and crun a container is its cgroup, which the caller emptied and removes, and this folder.
        for name in os.listdir(state):
            os.unlink(f"{state}/{name}")
        os.rmdir(state)


def stray_processes(container_id: str) -> list[int]:
    """The conmon and runtime processes of that container which are outside its cgroup: a crash can leave them.

    Only root's processes whose argument list names the id as a whole argument, and whose program is one of ours.
    """
    programs = {"conmon", *RUNTIMES}
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                arguments = file.read().split(b"\0")
            if container_id.encode() not in arguments or os.stat(f"/proc/{name}").st_uid != 0:
                continue
            if os.path.basename(os.readlink(f"/proc/{name}/exe")).removesuffix(" (deleted)") in programs:
                found.append(int(name))
        except OSError:
            continue
    return found


def _read_line(fd: int, timeout_s: float) -> bytes:
    data = b""
    deadline = time.monotonic() + timeout_s
    while not data.endswith(b"\n"):
        if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise EngineError(f"conmon said nothing for {timeout_s:.0f} s.", hint="sandbox doctor")
        piece = os.read(fd, 65536)
        if not piece:
            break
        data += piece
    return data


def _tail(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return escape(file.read()[-800:].decode("utf-8", "replace").strip().replace("\n", " ⏎ "))
    except OSError:
        return ""
