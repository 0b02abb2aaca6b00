"""Leases of uid ranges: 65,536 host ids per dyno, unique on the machine, whatever instance asks.

A lease is a file in one machine-wide folder that names the journal of the dyno that holds it. It ends when that
journal is gone: a crash keeps the range taken until the dyno's leftovers are reclaimed.
"""

from __future__ import annotations

import fcntl
import os
import random

from sandbox.errors import HostError
from sandbox.policy.spec import UIDS_PER_DYNO

LEASES = "/run/lock/sandbox-uids"


def lease(journal: str, *, base: int, slots: int, folder: str = LEASES) -> str:
    """Leases a range for the dyno with that journal and returns the lease's name, the range's first id.

    Ranges are taken from a random place, so that a range is rarely used again soon.
    """
    os.makedirs(folder, mode=0o755, exist_ok=True)
    lock = os.open(f"{folder}/.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        start = random.randrange(slots)  # noqa: S311 - spreads reuse, guards nothing
        for step in range(slots):
            first = base + (start + step) % slots * UIDS_PER_DYNO
            path = f"{folder}/{first}"
            holder = _holder(path)
            if holder is None or not os.path.exists(holder):
                with open(path, "w", encoding="utf-8") as file:
                    file.write(journal)
                return str(first)
    finally:
        os.close(lock)
    raise HostError(
        f"all {slots} uid ranges from {base} are taken.",
        hint="`sandbox gc` frees those of dead dynos; or raise uid_slots.",
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
    if not os.path.isdir(folder):
        return
    for name in os.listdir(folder):
        release(name, journal, folder=folder)
