"""A twin: the same policy on the same code path, with a prober in the place of the customer's code.

It lives in an instance and a network of its own (see stage), so a twin that was weakened on purpose is never near a
customer, and a crash of ours is reclaimed like any other run's.
"""

from __future__ import annotations

import ctypes
import fcntl
import glob
import hashlib
import json
import os
import select
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from sandbox.app import slug
from sandbox.config import Config
from sandbox.dyno import record as records
from sandbox.dyno.dyno import Dyno, Launch, Started
from sandbox.engine.base import Attachment, Container, Engine, Stream
from sandbox.engine.oci import OciEngine
from sandbox.errors import EngineError, HostError
from sandbox.firewall import guard, router
from sandbox.firewall.layout import Layout, link_name
from sandbox.host import disk, observe
from sandbox.host.cgroup import Cgroup
from sandbox.host.stack import Stack
from sandbox.policy.policy import Policy
from sandbox.policy.spec import ContainerSpec
from sandbox.report.facts import Facts
from sandbox.supervisor.reclaim import destroy_container, reclaim

PORT, OTHER_PORT = 5000, 9999
_ANSWER_S = 60.0
CANARY_VARIABLE = "SANDBOX_TWIN_CANARY"
Edit = Callable[[Any], None]


class Wanted(NamedTuple):
    """What the twin is a twin of. ``env_names``: of the app's variables; a twin gets them without their values."""

    app: str
    policy: Policy
    engine: str
    runtime: str
    stack: Stack
    env_names: tuple[str, ...]


class Weakness(NamedTuple):
    """What is taken out of a twin's wall, and only of a twin's. The wall's own code has no such switch."""

    policy: Callable[[Policy], Policy] = lambda policy: policy
    oci: Edit = lambda _: None
    docker: Edit = lambda _: None


NONE = Weakness()


class _Oci(OciEngine):
    """The embedded engine; its document passes through the weakness."""

    def __init__(self, config: Config, runtime: str, weakness: Weakness) -> None:
        super().__init__(config, runtime)
        self._weakness = weakness

    def document(self, spec: ContainerSpec) -> dict[str, object]:
        document = super().document(spec)
        self._weakness.oci(document)
        return document


def _docker(config: Config, home: Config, weakness: Weakness) -> Engine:
    from sandbox.engine.docker import DockerEngine  # its package takes 0.2 s to import

    class Weak(DockerEngine):
        """The Docker engine; its document passes through the weakness, its image is the instance's own."""

        def prepare(self, stack_digest: str, stack_root: str) -> str:
            return DockerEngine(home).prepare(stack_digest, stack_root)

        def document(self, spec: ContainerSpec) -> dict[str, object]:
            document = super().document(spec)
            weakness.docker(document)
            return document

    return Weak(config)


class _Twin(Dyno):
    """A dyno whose wall is examined by the report: what is missing is a finding there, and no reason to refuse."""

    def _verify(self, spec: ContainerSpec, container: Container, cgroup: Cgroup) -> None:
        if container.pid not in cgroup.pids():
            raise EngineError("the container's init is not in its cgroup.", hint="sandbox doctor")


class Prober:
    """The conversation with the program inside: one line of JSON out, one line in."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment, self._out, self._err = attachment, b"", b""

    def ready(self) -> None:
        line = self._line(30.0)
        if line != b"ready":
            raise HostError(f"the prober did not start: {(line + self._err)[-300:].decode('utf-8', 'replace')!r}")

    def ask(self, *groups: str, seconds: float = _ANSWER_S, **arguments: dict[str, Any]) -> dict[str, Any]:
        """The answers of those groups of attempts. HostError when the prober has ended or does not answer."""
        data = json.dumps({"groups": groups, **arguments}).encode() + b"\n"
        while data:
            data = data[self._attachment.send(data) :]
        answer: dict[str, Any] = json.loads(self._line(seconds))
        return answer

    def flood(self, amount: int, *, keep: bool) -> tuple[int, int]:
        """Lets the program write that many bytes as fast as it can: how many were read, and how much we grew."""
        data = json.dumps({"groups": ["flood"], "flood": {"bytes": amount}}).encode() + b"\n"
        self._attachment.send(data)
        # What was freed and not given back would take in the flood, and hide a reader that keeps it.
        ctypes.CDLL(None).malloc_trim(0)
        read, last, most, before = 0, b"", 0, _resident()
        pieces: list[bytes] = []
        deadline = time.monotonic() + _ANSWER_S
        while not last.endswith(b"}\n"):
            if not select.select([self._attachment.fileno()], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise HostError("the prober's flood did not end.")
            for _, piece in self._attachment.receive() or []:
                read += len(piece)
                last = (last + piece)[-64:]
                if keep:
                    pieces.append(piece)
            most = max(most, _resident() - before)
        return read, most

    def _line(self, seconds: float) -> bytes:
        deadline = time.monotonic() + seconds
        while b"\n" not in self._out:
            if not select.select([self._attachment.fileno()], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise HostError(f"the prober did not answer within {seconds:.0f} s.")
            chunks = self._attachment.receive()
            if chunks is None:
                raise HostError(f"the prober has ended: {self._err[-300:].decode('utf-8', 'replace')!r}")
            for stream, data in chunks:
                if stream is Stream.STDOUT:
                    self._out += data
                else:
                    self._err += data
        line, _, self._out = self._out.partition(b"\n")
        return line


def _resident() -> int:
    """Our own resident memory in bytes, see proc(5)."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


class Twin:
    """One live twin. ``close`` takes it down; the router stays for the next one."""

    def __init__(self, config: Config, home: Config, wanted: Wanted, weakness: Weakness = NONE) -> None:
        self.config, self.wanted = config, wanted
        self.engine: Engine = (
            _docker(config, home, weakness)
            if wanted.engine == "docker"
            else _Oci(config, wanted.runtime or "runc", weakness)
        )
        prober = _slug(config)
        launch = Launch(
            name="twin.1",
            app=wanted.app,
            policy=weakness.policy(wanted.policy),
            stack=wanted.stack,
            slug_image=prober.image,
            slug_digest=prober.digest,
            command=("/usr/bin/python3", "-I", "-S", "/app/prober.py"),
            env=dict.fromkeys(wanted.env_names, ""),
            stdin=True,
            port=PORT,
        )
        self.dyno = _Twin(config, self.engine, launch)
        self._started: Started | None = None
        try:
            self.dyno.prepare()
            self._started = self.dyno.start()
            self.prober = Prober(self._started.attachment)
            self.prober.ready()
        except BaseException:
            self.close()
            raise
        found = records.read(config, self.dyno.container_id)
        # What is promised is what the customer's dyno was promised, whatever this one got.
        self.record = found._replace(spec=found.spec._replace(policy=wanted.policy))

    @property
    def pid(self) -> int:
        return self.record.pid

    @property
    def cgroup(self) -> Cgroup:
        if self._started is None:
            raise HostError("the twin is down.")
        return self._started.cgroup

    @property
    def netns(self) -> str:
        return f"/proc/{self.pid}/ns/net"

    @property
    def link(self) -> str:
        """The router's end of its link."""
        return link_name(self.record.spec.container_id)

    def facts(self, attempts: dict[str, Any] | None, measured: dict[str, Any], calls: Any) -> Facts:
        return Facts(self.config, self.record, attempts=attempts, measured=measured, calls=calls)

    def close(self) -> None:
        if self._started is not None:
            self._started.attachment.close()
            self._started = None
        self.dyno.close(destroy_container(self.config, self.engine))


def _slug(config: Config) -> slug.Slug:
    """The prober as a slug, made once."""
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "prober")
    with open(f"{folder}/prober.py", "rb") as file:
        key = hashlib.sha256(file.read()).hexdigest()
    found = slug.find(config, key)
    if found is not None:
        return found
    tree = f"{config.slugs_dir}/.{key}.{os.getpid()}.d"
    os.makedirs(tree, mode=0o755)
    try:
        shutil.copyfile(f"{folder}/prober.py", f"{tree}/prober.py")
        os.chmod(f"{tree}/prober.py", 0o644)
        return slug.pack(config, tree, key)
    finally:
        shutil.rmtree(tree, ignore_errors=True)


@contextmanager
def instance(home: Config) -> Iterator[Config]:
    """An instance for twins below that of the caller: the first that nobody else uses now. Clean at both ends."""
    base = f"{home.state_dir}/twins"
    os.makedirs(base, mode=0o711, exist_ok=True)
    for number in range(16):
        lock = os.open(f"{base}/{number}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        try:
            yield from _prepared(home, f"{base}/{number}", f"{home.run_dir}/twins/{number}")
            return
        finally:
            os.close(lock)
    raise HostError("16 reports are made at the same time.", hint="wait for one of them.")


def forsaken(home: Config) -> list[str]:
    """Removes what reports left that were killed: their stages, and what is left of their twins; returns which."""
    removed = []
    for stage in glob.glob(f"{home.run_dir}/stage-*"):
        if time.time() - os.stat(stage).st_mtime < 10:
            continue  # made just now, perhaps not locked yet
        with _free(stage) as free:
            if free:
                for path in glob.glob(f"{stage}/*"):
                    disk.unmount(path)
                shutil.rmtree(stage)
                removed.append(stage)
    for lock in glob.glob(f"{home.state_dir}/twins/*.lock"):
        number = os.path.basename(lock).removesuffix(".lock")
        with _free(lock) as free:
            config = home._replace(
                state_dir=f"{home.state_dir}/twins/{number}", run_dir=f"{home.run_dir}/twins/{number}", linger_s=5
            )
            if free and os.path.isdir(config.run_dir):
                config.make_folders()
                removed += [name for name, _ in reclaim(config)]
                if os.path.isdir(Layout(config).folder):
                    remove_router(config)
    return removed


@contextmanager
def _free(path: str) -> Iterator[bool]:
    """Whether nobody holds the lock on a file or folder; for as long as the block runs, we do."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(fd)


def _prepared(home: Config, state: str, run: str) -> Iterator[Config]:
    os.makedirs(f"{home.run_dir}/twins", mode=0o711, exist_ok=True)
    config = home._replace(state_dir=state, run_dir=run, linger_s=5)
    for folder in (state, run):
        os.makedirs(folder, mode=0o711, exist_ok=True)
    if not os.path.lexists(config.stack_dir):
        os.symlink(home.stack_dir, config.stack_dir)
    config.make_folders()
    reclaim(config)
    remove_router(config)
    try:
        yield config
    finally:
        reclaim(config)
        remove_router(config)


def remove_router(config: Config) -> None:
    """Takes the twins' router down, whatever is left of it, in the network that the caller is in now."""
    layout = Layout(config)
    if not os.path.isdir(layout.folder):
        return
    with router.locked(layout):
        guard.stop(layout)
        for record in router.records(layout):
            os.unlink(layout.record(str(record["address"])))
        router.remove(layout)


def canary() -> str:
    """A secret in our own environment, which no twin may see."""
    return os.environ.setdefault(CANARY_VARIABLE, "canary-" + os.urandom(12).hex())


def stubborn(twin: Twin) -> dict[str, Any]:
    """Ends a twin with processes that ignore every signal they can: before, after SIGTERM, after the stop."""
    import signal

    twin.prober.ask("daemon")
    time.sleep(0.05)
    before = len(twin.cgroup.pids())
    twin.cgroup.signal(signal.SIGTERM, but=twin.pid)
    time.sleep(0.1)
    after_term = len(twin.cgroup.pids())
    group, begin = twin.cgroup, time.monotonic()
    twin.close()
    seconds = time.monotonic() - begin
    left = [pid for pid in group.pids() if not observe.ended(pid)]
    return {"before": before, "after_term": after_term, "after": len(left), "seconds": seconds}
