"""Starts one dyno behind its gate, verifies the wall, lets the app go, and takes everything down again."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from sandbox import names
from sandbox.config import Config
from sandbox.dyno import slot as slots
from sandbox.dyno.slot import DestroyContainer, Slot
from sandbox.engine.base import Attachment, Container, Engine
from sandbox.errors import ClauseError, EngineError, HostError
from sandbox.firewall import admit, guard, router
from sandbox.firewall.layout import Place
from sandbox.host import apparmor, observe
from sandbox.host.cgroup import Cgroup
from sandbox.host.journal import Journal
from sandbox.host.stack import Stack
from sandbox.policy import mounts
from sandbox.policy.clauses import Clause
from sandbox.policy.egress import Mode
from sandbox.policy.policy import Policy
from sandbox.policy.spec import ContainerSpec

if TYPE_CHECKING:
    from sandbox.dyno.verify import Difference

_GATE_TIMEOUT_S = 30.0


class Launch(NamedTuple):
    """What is to be started. ``env``: the app's whole environment; it reaches the app through the gate only."""

    name: str
    app: str
    policy: Policy
    stack: Stack
    slug_image: str
    command: tuple[str, ...]
    env: dict[str, str]
    tty: bool = False
    stdin: bool = False
    port: int = 0  # what the host may reach, of a web process
    slug_digest: str = ""


class Phases:
    """How long each phase took, in milliseconds, in order."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}
        self._last = time.monotonic()

    def mark(self, name: str) -> None:
        now = time.monotonic()
        self.ms[name] = round(self.ms.get(name, 0.0) + (now - self._last) * 1000, 2)
        self._last = now


class Started(NamedTuple):
    """A dyno behind a gate that has been opened."""

    container: Container
    attachment: Attachment
    cgroup: Cgroup
    totals: Cgroup


class Dyno:
    """One dyno, from nothing to nothing. ``close`` undoes whatever has been done, at any point."""

    def __init__(self, config: Config, engine: Engine, launch: Launch, *, phases: Phases | None = None) -> None:
        self._config, self._engine, self.launch = config, engine, launch
        self.container_id = names.new_container_id(config.host)
        self.phases = phases or Phases()
        self._journal: Journal | None = None
        self.slot: Slot | None = None
        self.place: Place | None = None
        self._used_at_start = (0, 0)
        self.examine: Callable[[], None] = lambda: None  # called behind the gate, once the wall was found to stand
        self.notices: socket.socket | None = None  # what the firewall denied, in words

    def prepare(self) -> Slot:
        """Takes the slot. Raises HostError; ``close`` cleans up."""
        launch, engine = self.launch, self._engine
        self._journal = Journal.start(
            self._config.journal_dir,
            self.container_id,
            {
                "id": self.container_id,
                "name": launch.name,
                "app": launch.app,
                "engine": engine.name,
                "runtime": engine.runtime,
                "size": launch.policy.size,
                "pid": os.getpid(),
                "started": time.time(),
                "policy": launch.policy.digest(),
            },
        )
        if launch.policy.holds(Clause.NETWORK):
            self.place = self._take_place(self._journal)
        self.phases.mark("network")
        self.slot = slots.take(
            self._config,
            self._journal,
            self.container_id,
            policy=launch.policy,
            stack=launch.stack,
            slug_image=launch.slug_image,
            hostname=names.hostname(launch.name),
            user_namespace=engine.user_namespaces,
            resolv_conf=launch.policy.egress.resolv_conf() if self.place else "",
            own_stack_mount=not engine.brings_mounts,
        )
        used_bytes, used_inodes = self._disk_used()
        self._used_at_start = used_bytes, used_inodes - 1  # the gate goes as soon as it was opened
        self.phases.mark("slot")
        return self.slot

    def _take_place(self, journal: Journal) -> Place:
        """A place in the network, and the router standing. The record comes first: it keeps the router from leaving."""
        launch = self.launch
        wish = admit.Wish(
            self.container_id, launch.name, launch.app, launch.policy.egress, launch.policy.traffic, launch.port
        )
        journal.record("network", self.container_id)
        place = admit.lease(self._config, wish)
        journal.record("network", self.container_id, address=str(place.address))
        router.ensure(self._config, forwarding=launch.policy.egress.mode is not Mode.NONE)
        guard.start(self._config)
        return place

    def start(self, *, meanwhile: Callable[[], None] = lambda: None) -> Started:
        """Creates the container, reads the wall back behind the gate, and opens the gate.

        ``meanwhile`` runs while the engine works: what is needed later can be loaded then.

        Raises ClauseError, which names every clause that is not enforced; then no instruction of the app has run.
        """
        slot, journal = self.slot, self._journal
        if slot is None or journal is None:
            raise RuntimeError("prepare() comes before start()")
        launch, engine = self.launch, self._engine
        image = engine.prepare(launch.stack.digest, slot.stack_layer)
        spec = ContainerSpec(
            container_id=self.container_id,
            hostname=names.hostname(launch.name),
            command=launch.command,
            policy=launch.policy,
            paths=slot.paths,
            uid_base=slot.uid_base,
            userns_path=slot.userns_path if engine.user_namespaces else "",
            cgroup=names.cgroup(self.container_id),
            tty=launch.tty,
            stdin=launch.stdin,
            stack_image=image,
            label=apparmor.ensure() if launch.policy.holds(Clause.LABEL) else "",
        )
        journal.record("container", self.container_id, engine=engine.name, runtime=engine.runtime)
        loader = threading.Thread(target=meanwhile)
        loader.start()
        try:
            container = engine.create(spec, slot.folder)
        finally:
            loader.join()
        self.phases.mark("create")
        attachment = engine.attach(container)
        container = engine.start(container)
        gate = _reach_gate(f"{slot.paths.disk}/fixed/gate/fifo", container.pid)
        self.phases.mark("start")
        try:
            cgroup = Cgroup.of(container.pid)
            if engine.brings_mounts:
                from sandbox.host import inside

                inside.restrict_engine_mounts(container.pid, max_terminals=mounts.MAX_TERMINALS)
            if launch.policy.holds(Clause.MEMORY):
                cgroup.limit_tcp(launch.policy.tcp_max_bytes)
            # Never into the host's own namespace, should an engine have given it: the verdict below names that.
            if self.place is not None and not observe.shares_network(container.pid):
                self.notices = _listen(f"{slot.folder}/firewall")
                admit.connect(self._config, self.place, f"/proc/{container.pid}/ns/net")
                self.phases.mark("connect")
            self._verify(spec, container, cgroup)
            self._write_record(spec, container, cgroup, slot.folder)
            self.phases.mark("verify")
            self.examine()
            _open_gate(gate, launch.env)
            os.unlink(f"{slot.paths.disk}/fixed/gate/fifo")
        finally:
            os.close(gate)
        self.phases.mark("gate")
        totals = Cgroup.at(spec.cgroup)
        return Started(container, attachment, cgroup, totals if totals.exists() else cgroup)

    def _verify(self, spec: ContainerSpec, container: Container, cgroup: Cgroup) -> None:
        pids = tuple(sorted(cgroup.pids(), key=lambda pid: pid != container.pid))
        if not pids or pids[0] != container.pid:
            raise EngineError("the container's init is not in its cgroup.", hint="sandbox doctor")
        from sandbox.dyno import verify  # loaded by ``meanwhile``

        subject = verify.Subject(spec, self._engine.user_namespaces, pids, cgroup, self._config, self.place)
        found = verify.differences(subject)
        if found:
            clauses = tuple(dict.fromkeys(difference.clause.value for difference in found))
            lines = "; ".join(_first(found, clause) for clause in clauses)
            raise ClauseError(
                f"{self.launch.name} not started: the kernel does not enforce its policy: {lines}. "
                "No instruction of the app ran.",
                clauses=clauses,
                hint="sandbox doctor says what this host lacks; "
                + " ".join(f"--waive {clause}" for clause in clauses)
                + " starts without that promise.",
            )

    def _write_record(self, spec: ContainerSpec, container: Container, cgroup: Cgroup, folder: str) -> None:
        from sandbox.dyno import record  # loaded by ``meanwhile``

        launch, engine = self.launch, self._engine
        held = (f"{pid} {fd}: {what}" for pid in cgroup.pids() for fd, what in observe.descriptors(pid).items())
        record.write(
            folder,
            record.Record(
                name=launch.name,
                app=launch.app,
                engine=engine.name,
                runtime=engine.runtime,
                user_namespace=engine.user_namespaces,
                spec=spec,
                place=self.place,
                port=launch.port,
                pid=container.pid,
                start_ticks=observe.start_ticks(container.pid),
                started=time.time(),
                boot_id=observe.boot_id(),
                stack_digest=launch.stack.digest,
                stack_manifest=launch.stack.manifest,
                slug_digest=launch.slug_digest,
                env_names=tuple(sorted(launch.env)),
                descriptors=tuple(held),
                mounts=tuple(observe.identity(line) for line in observe.mounts(container.pid)),
            ),
        )

    def _disk_used(self) -> tuple[int, int]:
        if self.slot is None:
            return 0, 0
        status = os.statvfs(self.slot.paths.disk)
        return (status.f_blocks - status.f_bfree) * status.f_frsize, status.f_files - status.f_ffree

    def written(self) -> tuple[int, int]:
        """Bytes and inodes that the dyno has on its disk beyond what it started with."""
        now = self._disk_used()
        return max(0, now[0] - self._used_at_start[0]), max(0, now[1] - self._used_at_start[1])

    def close(self, destroy: DestroyContainer) -> None:
        """Removes the container and gives the slot back."""
        if self.notices is not None:
            self.notices.close()
        if self.slot is not None:
            os.close(self.slot.userns_fd)
        if self._journal is not None:
            slots.give_back(self._config, self._journal, destroy)
            self._journal = None
        self.slot = None


def _listen(path: str) -> socket.socket:
    """Where the firewall's guard says what it denied; in a folder that only root may enter."""
    link = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    # The path of a Unix socket has at most 107 bytes; a folder's descriptor has few.
    folder = os.open(os.path.dirname(path), os.O_PATH | os.O_CLOEXEC)
    try:
        link.bind(f"/proc/self/fd/{folder}/{os.path.basename(path)}")
    finally:
        os.close(folder)
    return link


def _first(found: list[Difference], clause: str) -> str:
    """The first difference of a clause, and how many more it has."""
    mine = [difference for difference in found if difference.clause.value == clause]
    more = f" (and {len(mine) - 1} more)" if len(mine) > 1 else ""
    return f"{clause}: promised {mine[0].promised}, observed {mine[0].observed}{more}"


def _reach_gate(fifo: str, pid: int) -> int:
    """A write end of the gate: opening it succeeds exactly when the gate stands at its other end."""
    deadline = time.monotonic() + _GATE_TIMEOUT_S
    while True:
        try:
            return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
        if not os.path.exists(f"/proc/{pid}") or time.monotonic() > deadline:
            raise HostError(
                "not started: the container ended before it reached the gate; no instruction of the app ran.",
                hint="sandbox doctor",
            )
        time.sleep(0.0005)


def _open_gate(gate: int, env: dict[str, str]) -> None:
    import shlex

    lines = [f"export {name}={shlex.quote(value)}\n" for name, value in env.items()]
    script = "".join((*lines, "SANDBOX_GATE=open\n")).encode("utf-8", "surrogateescape")
    os.set_blocking(gate, True)
    try:
        while script:
            script = script[os.write(gate, script) :]
    except BrokenPipeError as error:
        raise HostError("the container ended at the gate.", hint="sandbox doctor") from error
