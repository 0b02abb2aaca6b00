"""The role of an engine, as the dyno's life needs it."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple, Protocol

from sandbox.policy.clauses import Clause
from sandbox.policy.spec import ContainerSpec


class Stream(Enum):
    """Which of the app's outputs a piece of text came from."""

    STDOUT = 1
    STDERR = 2


Chunk = tuple[Stream, bytes]


class Container(NamedTuple):
    """A container that exists. ``pid``: its init on the host; 0 while the engine has not made one."""

    container_id: str
    pid: int


class Attachment(Protocol):
    """The app's input and output. Lossless: an app that writes faster than we read waits."""

    def fileno(self) -> int: ...

    def receive(self) -> list[Chunk] | None:
        """What has arrived, without waiting; None when the output has ended."""

    def send(self, data: bytes) -> int:
        """Passes input on, without waiting; how many bytes were taken."""

    def end_input(self) -> None:
        """The app's input ends here."""

    def resize(self, rows: int, columns: int) -> None:
        """Tells the app's terminal its size."""

    def close(self) -> None: ...


class Engine(Protocol):
    """Makes, starts and removes containers; keeps no state of its own that a crash could lose."""

    @property
    def name(self) -> str: ...

    @property
    def runtime(self) -> str: ...

    @property
    def user_namespaces(self) -> bool:
        """Whether each container gets the prepared user namespace of its own."""

    @property
    def brings_mounts(self) -> bool:
        """Whether the engine mounts the root file system itself, from an image of its own."""

    @property
    def networked(self) -> bool:
        """Whether the app uses the interfaces of its network namespace, and not a network stack of the engine's own."""

    def version(self) -> str:
        """The engine's and runtime's versions, for people."""

    def missing(self) -> dict[Clause, str]:
        """The clauses that this engine cannot enforce on this host, each with the reason."""

    def prepare(self, stack_digest: str, stack_root: str) -> str:
        """Makes the stack known to the engine; returns the name for ``ContainerSpec.stack_image``."""

    def create(self, spec: ContainerSpec, folder: str) -> Container:
        """Makes the container; nothing runs in it yet. ``folder`` is the dyno's, below the run directory."""

    def attach(self, container: Container) -> Attachment:
        """Connects to the container's input and output, before the start, so that nothing is missed."""

    def start(self, container: Container) -> Container:
        """Starts the init and the gate; the result has the pid."""

    def signals_itself(self, container: Container, number: int) -> bool:
        """Signals every process of the app, where only the engine can tell them apart; False: the host can."""

    def exit_status(self, container: Container, *, timeout_s: float) -> int | None:
        """The status with which init ended (128 + N after signal N); None when nobody knows."""

    def lost(self, container: Container) -> bool:
        """Whether the process that holds the container's output and exit status is gone, while the app may live."""

    def destroy(self, container_id: str, folder: str) -> None:
        """Removes the container and whatever the engine left of it; twice is as good as once."""
