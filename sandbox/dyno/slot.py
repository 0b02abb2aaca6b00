"""A slot: the host resources lent to one dyno, taken in order, written down first, given back in reverse."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

from sandbox import names
from sandbox.config import Config
from sandbox.errors import HostError, SandboxError
from sandbox.firewall import admit
from sandbox.firewall.layout import link_name
from sandbox.host import disk, ids, syscalls
from sandbox.host.cgroup import Cgroup
from sandbox.host.journal import Journal
from sandbox.host.stack import Stack
from sandbox.policy.policy import Policy
from sandbox.policy.spec import APP_UID, SlotPaths

# Removes the container of a step: (engine name, runtime, container id, dyno folder).
DestroyContainer = Callable[[str, str, str, str], None]


class Slot(NamedTuple):
    """What one dyno got. ``userns_fd`` stays open while the container is made."""

    container_id: str
    folder: str
    uid_base: int
    userns_fd: int
    paths: SlotPaths
    stack_layer: str

    @property
    def userns_path(self) -> str:
        # "/./": runc from 1.1.10 on takes every path that begins with /proc/NUMBER for /proc/NUMBER/ns/user, and would
        # compare with our own mappings.
        return f"/proc/./{os.getpid()}/fd/{self.userns_fd}"


def take(
    config: Config,
    journal: Journal,
    container_id: str,
    *,
    policy: Policy,
    stack: Stack,
    slug_image: str,
    hostname: str,
    user_namespace: bool,
    resolv_conf: str = "",
    own_stack_mount: bool = True,
) -> Slot:
    """Takes a uid range, layers, a disk image and the mounts; every step is in the journal before it is taken.

    ``own_stack_mount``: the engine takes its root from our mount (OCI) and not from an image of its own (Docker).
    """
    folder = f"{config.dynos_dir}/{container_id}"
    journal.record("folder", folder)
    os.mkdir(folder, 0o711)
    journal.record("uids", "")
    first = ids.lease(journal.path, base=config.uid_base, slots=config.uid_slots)
    journal.record("uids", first)
    uid_base = int(first)
    uid = uid_base + APP_UID
    userns = syscalls.user_namespace(uid_base, owner=uid)
    stack_layer = disk.hold_layer(config, journal, stack.image)
    slug_layer = disk.hold_layer(config, journal, slug_image)
    paths = disk.build(
        config,
        journal,
        folder,
        image=f"{config.disks_dir}/{container_id}.ext4",
        policy=policy,
        stack_layer=stack_layer if own_stack_mount else None,
        slug_layer=slug_layer,
        userns_fd=userns,
        root_uid=uid_base if user_namespace else 0,
        uid=uid,
        files=_files(policy, hostname, APP_UID if user_namespace else uid, resolv_conf),
    )
    # Recorded now, made by the runtime: it creates the cgroup in every hierarchy.
    journal.record("cgroup", names.cgroup(container_id))
    return Slot(container_id, folder, uid_base, userns, paths, stack_layer)


def _files(policy: Policy, hostname: str, uid: int, resolv_conf: str) -> dict[str, str]:
    """The small files that make the dyno know itself. ``uid``: the app's, as the dyno sees it."""
    cpus = _host_file("/sys/devices/system/cpu/online", "0")
    return {
        "etc/passwd": f"root:x:0:0:root:/root:/bin/sh\ndyno:x:{uid}:{uid}:dyno:/app:/bin/bash\n"
        "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
        "etc/group": f"root:x:0:\ntty:x:5:\ndyno:x:{uid}:\nnogroup:x:65534:\n",
        "etc/hosts": f"127.0.0.1 localhost localhost.localdomain\n::1 localhost\n127.0.1.1 {hostname}\n",
        "etc/hostname": f"{hostname}\n",
        "etc/resolv.conf": resolv_conf,
        # The path that Heroku's buildpacks read for the dyno's memory, whatever cgroup version the host has.
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{policy.memory_quota_bytes}\n",
        # Go, the JVM and libuv count processors here.
        "sys/devices/system/cpu/online": cpus,
        "sys/devices/system/cpu/possible": cpus,
    }


def _host_file(path: str, otherwise: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read()
    except OSError:
        return otherwise + "\n"


def give_back(config: Config, journal: Journal, destroy: DestroyContainer) -> list[str]:
    """Undoes every step of the journal, newest first, and removes it; returns what each undo was, for people.

    Each undo does nothing when its step was not taken, or was undone before. When one fails the journal stays, so
    that the next command tries again; HostError says what is still there.
    """
    undone: list[str] = []
    failed: list[str] = []
    for step in reversed(journal.steps()):
        op, name = step["op"], step["name"]
        try:
            _UNDO[op](config, journal, step, destroy)
            undone.append(f"{op} {name}".strip())
        except (OSError, SandboxError) as error:
            failed.append(f"{op} {name}: {error}")
    if failed:
        journal.close()
        raise HostError("could not remove " + "; ".join(failed), hint="sandbox gc tries again.")
    journal.finish()
    return undone


Undo = Callable[[Config, Journal, dict[str, str], DestroyContainer], None]


def _undo_container(config: Config, _: Journal, step: dict[str, str], destroy: DestroyContainer) -> None:
    folder = f"{config.dynos_dir}/{step['name']}"
    group = Cgroup.at(names.cgroup(step["name"]))
    group.kill()
    destroy(step["engine"], step["runtime"], step["name"], folder)
    if not group.kill():
        raise HostError("its processes do not end")


def _undo_cgroup(_: Config, __: Journal, step: dict[str, str], ___: DestroyContainer) -> None:
    group = Cgroup.at(step["name"])
    if not (group.kill() and group.remove()):
        raise HostError("it is not empty")


def _undo_mount(_: Config, __: Journal, step: dict[str, str], ___: DestroyContainer) -> None:
    disk.unmount(step["name"])


def _undo_layer(config: Config, journal: Journal, step: dict[str, str], _: DestroyContainer) -> None:
    disk.release_layer(config, journal, step["name"])


def _undo_image(_: Config, __: Journal, step: dict[str, str], ___: DestroyContainer) -> None:
    if os.path.exists(step["name"]):
        os.unlink(step["name"])


def _undo_uids(_: Config, journal: Journal, step: dict[str, str], __: DestroyContainer) -> None:
    if step["name"]:
        ids.release(step["name"], journal.path)
    else:
        ids.release_all(journal.path)


def _undo_folder(_: Config, __: Journal, step: dict[str, str], ___: DestroyContainer) -> None:
    disk.remove_tree(step["name"])


def _undo_network(config: Config, _: Journal, step: dict[str, str], __: DestroyContainer) -> None:
    admit.withdraw(config, link_name(step["name"]), step.get("address", ""))


def _undo_nothing(*_: object) -> None:
    """For steps that were an undo themselves."""


_UNDO: dict[str, Undo] = {
    "unlayer": _undo_nothing,
    "container": _undo_container,
    "cgroup": _undo_cgroup,
    "mount": _undo_mount,
    "layer": _undo_layer,
    "image": _undo_image,
    "uids": _undo_uids,
    "folder": _undo_folder,
    "network": _undo_network,
}
