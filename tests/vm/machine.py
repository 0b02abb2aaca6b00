"""One guest under QEMU: direct kernel boot, a verdict over a serial port, and nothing believed that it does not say.

A guest counts as good when it has said the word that only its own last step says (``verdict NONCE passed``). How QEMU
ends means nothing: a crash, a panic, a hang and a guest that did no test all end here as MachineError.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Self

from tests.vm.image import Image

Say = Callable[[str], None]
MEMORY_MIB = 4096
# Threads of emulated processors that wait for each other's locks cost more than they bring once they share a host's:
# two guests side by side on two processors take 25 % less time with one each.
CPUS = 2 if (os.cpu_count() or 1) >= 4 else 1
_QEMU = "qemu-system-x86_64"
# Without the two flags the guest's kernel clears and copies pages by words, not by bytes: twice as fast when emulated.
_EMULATED = "max,-erms,-fsrm"
# QEMU 7.2, Debian 12's own, crashes under the kernel of Debian 13 without KVM.
_OLDEST = 8


class MachineError(Exception):
    """A guest that did not come to its verdict: why, what it was doing, where its console is."""


class Verdict(NamedTuple):
    """``passed``: what the guest said; ``results``: the folder with its JUnit files, logs and journal."""

    passed: bool
    results: Path
    seconds: float


def qemu() -> str:
    """QEMU's path, when it is there and new enough. MachineError otherwise."""
    path = shutil.which(_QEMU)
    if path is None:
        raise MachineError(f"{_QEMU} is not installed: `make vm-host` installs it.")
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    version = text.split("version ")[1].split(" ")[0]
    if int(version.split(".")[0]) < _OLDEST:
        raise MachineError(f"QEMU {version} is too old, {_OLDEST}.0 is needed: `make vm-host` installs it.")
    return path


def accelerator(kernel: Path, initrd: Path, say: Say, device: str = "/dev/kvm") -> tuple[str, ...]:
    """KVM when a kernel really boots under it. /dev/kvm may open and answer, and still run no stock kernel."""
    slow = ("-accel", "tcg,thread=multi,tb-size=1024")
    if not os.access(device, os.R_OK | os.W_OK):
        say(f"no {device}: the guests' processors are emulated")
        return slow
    with tempfile.TemporaryDirectory() as folder:
        console = Path(folder) / "console"
        words = [
            qemu(),
            "-accel",
            "kvm",
            "-cpu",
            "host",
            *_bare(console),
            "-kernel",
            str(kernel),
            "-initrd",
            str(initrd),
        ]
        trial = subprocess.Popen(
            [*words, "-append", "console=ttyS0 panic=-1"], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 15
        while trial.poll() is None and time.monotonic() < deadline:
            # The initrd speaks: interrupts, timers and user mode work.
            if console.exists() and b"Run /init" in console.read_bytes():
                break
            time.sleep(0.1)
        works = console.exists() and b"Run /init" in console.read_bytes()
        trial.kill()
        trial.communicate()
    if works:
        return ("-accel", "kvm")
    say(f"{device} is there, but no kernel boots under it: the guests' processors are emulated")
    return slow


def _bare(console: Path | None) -> list[str]:
    serial = ["-serial", f"file:{console}"] if console else ["-serial", "mon:stdio"]
    return [
        "-M",
        "q35",
        "-nodefaults",
        "-display",
        "none",
        "-nic",
        "none",
        "-no-reboot",
        "-m",
        str(MEMORY_MIB),
        *serial,
    ]


def argv(image: Image, payload: Path, accel: tuple[str, ...], console: Path | None, append: str) -> list[str]:
    """QEMU's command line. The root disk is never written: writes go to a file that ends with QEMU."""
    return [
        qemu(), *accel, "-cpu", "host" if "kvm" in accel else _EMULATED, "-smp", str(CPUS), *_bare(console),
        "-kernel", str(image.kernel), "-initrd", str(image.initrd),
        "-append", f"root=/dev/vda rw console=ttyS0 panic=-1 {append}",
        "-drive", f"file={image.root},format=raw,if=virtio,snapshot=on,cache=unsafe",
        "-drive", f"file={payload},format=raw,if=virtio,readonly=on",
        "-device", "virtio-rng-pci",
    ]  # fmt: skip


class Machine:
    """A guest that runs its tests. Several run at once: every path is below ``folder``, and it has no network."""

    def __init__(
        self, image: Image, payload: Path, folder: Path, accel: tuple[str, ...], say: Say, append: str = ""
    ) -> None:
        self.image, self.folder, self._say = image, folder, say
        self._nonce = secrets.token_hex(8)
        self.console = folder / "console.log"
        self.doing, self._verdict, self._buffer = "boot", "", b""
        ports = [
            "-device", "virtio-serial-pci",
            "-chardev", f"socket,id=talk,path={folder}/talk,server=on,wait=off", "-device", "virtserialport,chardev=talk,name=sandbox.talk",
            "-chardev", f"file,id=out,path={folder}/results.tar", "-device", "virtserialport,chardev=out,name=sandbox.results",
            "-qmp", f"unix:{folder}/qmp,server=on,wait=off",
        ]  # fmt: skip
        words = argv(image, payload, accel, self.console, f"sandbox.run={self._nonce} {append}")
        self._log = (folder / "qemu.log").open("wb")
        self._begin = time.monotonic()
        # Its own session: a Ctrl-C ends us, and we end it; the kernel does when we are killed. TMPDIR: where its writes go.
        self._qemu = subprocess.Popen(
            ["setpriv", "--pdeathsig=KILL", *words, *ports], stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, start_new_session=True,
            env={**os.environ, "TMPDIR": str(folder)},
        )  # fmt: skip
        self._links: list[socket.socket] = []
        try:
            self._talk, self._qmp = self._connect("talk"), self._connect("qmp")
            self._ask("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connect(self, name: str) -> socket.socket:
        link = socket.socket(socket.AF_UNIX)
        self._links.append(link)
        deadline = time.monotonic() + 20
        while True:
            try:
                # A Unix socket's path is short; a test's folder may not be.
                fd = os.open(self.folder, os.O_PATH)
                try:
                    link.connect(f"/proc/self/fd/{fd}/{name}")
                finally:
                    os.close(fd)
                return link
            except OSError as error:
                if self._qemu.poll() is not None or time.monotonic() > deadline:
                    raise self._error("QEMU did not start") from error
                time.sleep(0.05)

    def _ask(self, command: str, **arguments: str) -> None:
        self._qmp.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")

    def wait(self, timeout_s: float) -> Verdict:
        """The guest's own verdict. MachineError, with what it was doing, when it ends or hangs before."""
        deadline = self._begin + timeout_s
        while not self._verdict:
            if (left := deadline - time.monotonic()) <= 0:
                raise self._error(f"no verdict within {timeout_s:.0f} s")
            self._talk.settimeout(min(left, 5.0))
            try:
                piece = self._talk.recv(65536)
            except TimeoutError:
                continue
            if not piece:
                self._qemu.wait(30)
                raise self._error("it ended without a verdict")
            *lines, self._buffer = (self._buffer + piece).split(b"\n")
            for line in lines:
                self._hear(line.decode("utf-8", "replace"))
        results = self._results()
        return Verdict(self._verdict == "passed", results, time.monotonic() - self._begin)

    def _hear(self, line: str) -> None:
        kind, _, rest = line.partition(" ")
        if kind == "doing":
            self.doing = rest
        elif kind == "say":
            self._say(f"{self.image.guest} ({time.monotonic() - self._begin:.0f} s): {rest}")
        elif kind == "reset":
            self.reset()
        elif kind == "verdict" and rest.startswith(f"{self._nonce} "):
            self._verdict = rest.removeprefix(f"{self._nonce} ")

    def reset(self) -> None:
        """As if somebody pulled the plug and put it back: what was in the guest's memory is gone."""
        self._ask("set-action", reboot="reset")
        self._ask("system_reset")
        time.sleep(1)
        self._ask("set-action", reboot="shutdown")

    def _results(self) -> Path:
        """What the guest sent before its verdict; QEMU is ended first, so that all of it is on disk."""
        self._ask("quit")
        self._qemu.wait(30)
        folder = self.folder / "results"
        try:
            with tarfile.open(self.folder / "results.tar") as archive:
                archive.extractall(folder, filter="data")
        except (tarfile.TarError, OSError) as error:
            raise self._error("it gave a verdict and no results") from error
        return folder

    def _error(self, what: str) -> MachineError:
        text = self.console.read_bytes().decode("utf-8", "replace") if self.console.exists() else ""
        panic = text.find("Kernel panic")
        shown = text[max(0, panic - 1500) : panic + 1500] if panic >= 0 else text[-2000:]
        self._log.flush()
        said = (self.folder / "qemu.log").read_text(errors="replace").strip()[-500:]
        why = "its kernel panicked" if panic >= 0 else what
        return MachineError(
            f"{self.image.guest}: {why}, {time.monotonic() - self._begin:.0f} s after its start, during: {self.doing}\n"
            f"{said}\n--- the end of its console, all of it is in {self.console}\n{shown}"
        )

    def close(self) -> None:
        """Ends QEMU, however it stands."""
        if self._qemu.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._qemu.pid, signal.SIGKILL)
            self._qemu.wait()
        for link in self._links:
            link.close()
        self._log.close()
