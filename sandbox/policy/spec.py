"""What one container is, beyond its policy: names, ids, paths, command. The input of both compilers."""

from __future__ import annotations

from typing import NamedTuple

from sandbox.policy.policy import Policy

APP_UID = 1000
UIDS_PER_DYNO = 65536

# The gate: what runs first in every container, under the whole wall, from the read-only stack image. Opening the
# FIFO blocks until the supervisor has read the wall back from the kernel; what then comes through it are the
# dyno's config vars, so none of them (LD_PRELOAD, say) touches a process before the verdict, none is on a command
# line and none on a disk. A supervisor that dies half-way leaves the mark unset, and the app never starts.
# It also evens out what engines add by themselves: a file-mode mask, a HOSTNAME variable.
GATE = (
    'umask 077; unset HOSTNAME; . /run/gate/fifo; [ "$SANDBOX_GATE" = open ] || exit 125; unset SANDBOX_GATE; exec "$@"'
)
INIT = ("/usr/bin/tini", "--", "/bin/sh", "-c", GATE, "gate")
PATH = "/usr/local/bin:/usr/bin:/bin"


class SlotPaths(NamedTuple):
    """Where the supervisor prepared the dyno's mounts on the host."""

    root: str  # the stack image, with the dyno's ids
    app: str  # the overlay
    disk: str  # the writable disk image
    fixed: str  # the disk image's ``fixed`` folder, read-only


class ContainerSpec(NamedTuple):
    """One container, ready to be compiled for an engine.

    ``uid_base``: first host id of the dyno's range. ``userns_path``: where an engine that can join a prepared user
    namespace finds it; empty for one that cannot: then the app runs as the host id itself. ``cgroup``: in every
    hierarchy the container's own, or the parent of it.
    """

    container_id: str
    hostname: str
    command: tuple[str, ...]
    policy: Policy
    paths: SlotPaths
    uid_base: int
    userns_path: str
    cgroup: str
    tty: bool = False
    stdin: bool = False
    label: str = ""  # the AppArmor profile; empty where AppArmor is off
    stack_image: str = ""  # the name under which an engine with images of its own knows the stack

    @property
    def host_uid(self) -> int:
        """The unprivileged host id that no other dyno has."""
        return self.uid_base + APP_UID

    @property
    def argv(self) -> tuple[str, ...]:
        return (*INIT, *self.command)

    @property
    def env(self) -> tuple[str, ...]:
        """All that the gate itself gets; the dyno's own variables come through the gate."""
        return (f"PATH={PATH}", *(("TERM=xterm",) if self.tty else ()))
