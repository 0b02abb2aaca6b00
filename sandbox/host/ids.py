"""Leases of uid ranges: 65,536 host ids per dyno, unique on the machine, whatever instance asks.

A lease is a file in one machine-wide folder that names the journal of the dyno that holds it. It ends when that
journal is gone: a crash keeps the range taken until the dyno's leftovers are reclaimed.
"""

from __future__ import annotations

import fcntl
import os
import stat

from sandbox.errors import HostError
from sandbox.policy.spec import UIDS_PER_DYNO

# Root's own folder: /run/lock is writable for everybody on Debian, and whoever came first would own the leases.
LEASES = "/run/sandbox-uids"
_NEW = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC


def lease(journal: str, *, base: int, slots: int, folder: str = LEASES) -> str:
    """Leases a range for the dyno with that journal and returns the lease's name, the range's first id.

    Ranges are taken from a random place, so that a range is rarely used again soon.
    """
    _make_folder(folder)
    lock = os.open(f"{folder}/.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        start = int.from_bytes(os.urandom(4)) % slots
        for step in range(slots):
            first = base + (start + step) % slots * UIDS_PER_DYNO
            path = f"{folder}/{first}"
            holder = _holder(path)
            if holder is None or not os.path.exists(holder):
                with os.fdopen(os.open(path, _NEW, 0o600), "w", encoding="utf-8") as file:
                    file.write(journal)
                return str(first)
    finally:
        os.close(lock)
    raise HostError(
        f"all {slots} uid ranges from {base} are taken.",
        hint="`sandbox gc` frees those of dead dynos; or raise uid_slots.",
    )


def _make_folder(folder: str) -> None:
    os.makedirs(folder, mode=0o700, exist_ok=True)
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise HostError(
            f"{folder} is not a folder that only root can write to.", hint=f"remove {folder}; find out who made it."
        )


def release(first: str, journal: str, *, folder: str = LEASES) -> None:
    """Ends the lease if that journal still holds it."""
    if first.isdigit() and _holder(f"{folder}/{first}") == journal:
        os.unlink(f"{folder}/{first}")


def _holder(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return None


def release_all(journal: str, *, folder: str = LEASES) -> None:
    """Ends every lease that journal holds: for a crash between taking a lease and writing its number down."""
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        release(name, journal, folder=folder)


def sweep(journal_dir: str, *, folder: str = LEASES) -> list[str]:
    """Ends the leases of dynos of one instance whose journal is gone; returns which."""
    ended = []
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        holder = _holder(f"{folder}/{name}") if name.isdigit() else None
        if holder is not None and os.path.dirname(holder) == journal_dir and not os.path.exists(holder):
            os.unlink(f"{folder}/{name}")
            ended.append(name)
    return ended
