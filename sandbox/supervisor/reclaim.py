"""Finds what dead owners left behind, from journals and from names, and removes it. Runs before every command."""

from __future__ import annotations

import os
import re
import signal
import time

from sandbox import names
from sandbox.config import Config
from sandbox.dyno import slot
from sandbox.engine.base import Engine
from sandbox.errors import HostError, SandboxError
from sandbox.firewall import admit, router
from sandbox.firewall.layout import Layout
from sandbox.host import cgroup, disk, ids
from sandbox.host import journal as journals
from sandbox.host.journal import Journal
from sandbox.supervisor import engines


def destroy_container(config: Config, live: Engine | None = None) -> slot.DestroyContainer:
    """How the container of a journal step is removed: by the live engine that made it, or after a crash."""

    def destroy(engine: str, runtime: str, container_id: str, folder: str) -> None:
        if live is not None:
            live.destroy(container_id, folder)
            return
        if engine == "oci":
            _end_strays(container_id)
        engines.make(config, engine, runtime).destroy(container_id, folder)

    return destroy


def _end_strays(container_id: str) -> None:
    """Kills conmon and runtime processes of a container whose owner died in the middle of making it."""
    from sandbox.engine.oci import stray_processes

    deadline = time.monotonic() + 10.0
    while strays := stray_processes(container_id):
        if time.monotonic() > deadline:
            raise HostError(f"processes {strays} of {container_id} do not end")
        for pid in strays:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.005)


def reclaim(config: Config) -> list[tuple[str, list[str]]]:
    """Undoes every journal without a living owner; returns (container id, what was undone) for each.

    Raises HostError, after it has tried all of them, when something could not be removed.
    """
    done: list[tuple[str, list[str]]] = []
    failed: list[str] = []
    docker_seen = False
    for path in journals.paths(config.journal_dir):
        journal = Journal.adopt(path)
        if journal is None:
            continue
        header = journal.header()
        docker_seen = docker_seen or header.get("engine") == "docker"
        try:
            done.append(
                (
                    str(header.get("id", os.path.basename(path))),
                    slot.give_back(config, journal, destroy_container(config)),
                )
            )
        except SandboxError as error:
            journal.close()
            failed.append(error.message)
    if docker_seen:
        try:
            done += _docker_strays(config)
        except SandboxError as error:
            failed.append(error.message)
    if done or failed:
        from sandbox.host.eventlog import record

        for container_id, undone in done:
            record(config, "reclaimed", id=container_id, undone=undone)
        for message in failed:
            record(config, "reclaim failed", message=message)
    if failed:
        raise HostError("leftovers remain: " + "; ".join(failed), hint="sandbox gc tries again.")
    return done


def sweep(config: Config) -> list[str]:
    """Removes what carries this instance's name and is in no journal at all: a journal can be lost.

    A dyno writes its journal before anything else. So the candidates are listed first and the journals afterwards:
    what was there before and has no journal then belongs to nobody, however many dynos start meanwhile.
    """
    groups = {name for path in set(cgroup.Cgroup.at("").paths.values()) for name in _list(path)}
    folders, disks = _list(config.dynos_dir), _list(config.disks_dir)
    records = router.records(Layout(config))
    drafts = [f"{config.journal_dir}/{name}" for name in _list(config.journal_dir) if name.endswith(".new")]
    known = _known(config)
    removed: list[str] = []
    for draft in drafts:
        # A living owner renames its draft within the same millisecond.
        if os.path.exists(draft) and time.time() - os.stat(draft).st_mtime > 60:
            os.unlink(draft)
            removed.append(draft)
    for container_id in sorted(groups):
        if names.is_container_id(container_id, config.host) and container_id not in known:
            _end_strays(container_id)
            group = cgroup.Cgroup.at(names.cgroup(container_id))
            if group.kill() and group.remove():
                removed.append(f"cgroup {container_id}")
    for container_id in folders:
        if container_id not in known:
            folder = f"{config.dynos_dir}/{container_id}"
            for target in _mounts_below(folder):
                disk.unmount(target)
            disk.remove_tree(folder)
            removed.append(folder)
    for name in disks:
        container_id = name.removesuffix(".ext4")
        if names.is_container_id(container_id, config.host) and container_id not in known:
            os.unlink(f"{config.disks_dir}/{name}")
            removed.append(f"{config.disks_dir}/{name}")
    for record in records:
        if record["id"] not in known:
            admit.withdraw(config, record["link"], record["address"])
            removed.append(f"address {record['address']}")
    layout = Layout(config)
    with router.locked(layout):
        if router.standing(layout) and not router.records(layout) and not router.guarded(layout):
            router.remove(layout)
            removed.append("the router, which had no dyno and no guard")
    removed += _drafts(config)
    removed += disk.release_unused_layers(config)
    removed += [f"uid range {first}" for first in ids.sweep(config.journal_dir)]
    return removed


def _drafts(config: Config) -> list[str]:
    """Half-made slugs, templates and stack images whose maker is dead; its pid is part of every draft's name.

    A pid that was reused keeps a draft until the next time: these hold disk space, nothing else.
    """
    import shutil

    removed = []
    for folder, prefix in ((config.slugs_dir, "."), (config.disks_dir, "template-"), (config.stack_dir, "work-")):
        for name in _list(folder):
            parts = re.split(r"[.-]", name.removesuffix(".d"))
            maker = next((part for part in reversed(parts) if part.isdigit()), None)
            finished = not name.startswith(prefix) or name.endswith(".ext4") or maker is None
            if finished or os.path.exists(f"/proc/{maker}"):
                continue
            path = f"{folder}/{name}"
            if os.path.isdir(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)
            removed.append(path)
    return removed


def _known(config: Config) -> set[str]:
    return {os.path.basename(path).removesuffix(".jsonl") for path in journals.paths(config.journal_dir)}


def _docker_strays(config: Config) -> list[tuple[str, list[str]]]:
    engine = engines.make(config, "docker", None)
    remove = getattr(engine, "remove_strays", None)
    return [(name, ["container"]) for name in (remove(lambda: _known(config)) if remove else [])]


def _list(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except FileNotFoundError:
        return []


def _mounts_below(folder: str) -> list[str]:
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        targets = [line.split(" ", 5)[4] for line in file]
    return [target for target in reversed(targets) if target.startswith(f"{folder}/")]
