"""The dyno sizes: Heroku's figures for memory, processes and the kill multiple; ours for CPU and disk.

Sources: RAM and process limits, Heroku's dyno documentation 2024-06 and 2024-12; kill limits 2024-10 (the table in
SIZES names them). Heroku states CPU as shares only ("1x-4x") and no disk size: the caps and the disk figures here
are our own decision (docs/decisions/0004-sizes.md).
"""

from __future__ import annotations

from typing import NamedTuple

from sandbox.errors import UsageError
from sandbox.units import GIB, MIB, show


class Traffic(NamedTuple):
    """Bounds on a dyno's network: flows at a time, new ones a second, bytes a second in each direction."""

    flows: int
    flows_per_s: int
    bytes_per_s: int


class Size(NamedTuple):
    """One dyno size.

    ``memory_bytes``: the quota; over it, R14. ``kill_bytes``: R15, the dyno is killed. ``pids``: processes and
    threads. ``cpu_shares``: weight against other dynos (1024 = Heroku's 1x). ``cpus``: cap in CPUs, 0 = none.
    """

    name: str
    memory_bytes: int
    kill_bytes: int
    pids: int
    cpu_shares: int
    cpus: float
    disk_bytes: int = GIB
    disk_inodes: int = 65536
    traffic: Traffic = Traffic(1000, 200, 125_000_000)


def _table() -> dict[str, Size]:
    small = (512 * MIB, GIB, 256, 1024, 1.0)
    rows = {
        "eco": small,
        "basic": small,
        "standard-1x": small,
        "standard-2x": (GIB, 2 * GIB, 512, 2048, 2.0),
        "performance-m": (2560 * MIB, 5 * GIB, 16384, 12 * 1024, 0.0),
        "performance-l": (14 * GIB, 28 * GIB, 32768, 50 * 1024, 0.0),
        "performance-l-ram": (30 * GIB, 36 * GIB, 16384, 24 * 1024, 0.0),
        "performance-xl": (62 * GIB, 74 * GIB, 32768, 50 * 1024, 0.0),
        "performance-2xl": (126 * GIB, 151 * GIB, 65536, 100 * 1024, 0.0),
    }
    disks = {
        "performance-m": 4,
        "performance-l": 8,
        "performance-l-ram": 8,
        "performance-xl": 16,
        "performance-2xl": 16,
    }
    return {
        name: Size(
            name,
            *row,
            disk_bytes=disks.get(name, 1) * GIB,
            disk_inodes=disks.get(name, 1) * 65536,
            traffic=_traffic(name),
        )
        for name, row in rows.items()
    }


def _traffic(name: str) -> Traffic:
    """Heroku states none. A Linux host tracks 262,144 flows by default: no size may take a twentieth of that.

    Flows that have closed are tracked for ten more seconds (firewall.ruleset) and no longer counted, so it is the sum
    of the flows and ten seconds of new ones that has to stay below 13,107.
    """
    if name == "standard-2x":
        return Traffic(2000, 400, 250_000_000)
    return Traffic(8000, 500, 1_250_000_000) if name.startswith("performance") else Traffic(1000, 200, 125_000_000)


SIZES = _table()
DEFAULT = "standard-1x"
_SHORT = {"1x": "standard-1x", "2x": "standard-2x"}


def find(name: str) -> Size:
    """The size of that name; ``1x`` and ``2x`` are the standard ones. UsageError lists those there are."""
    size = SIZES.get(_SHORT.get(name.lower(), name.lower()))
    if size is None:
        raise UsageError(f"there is no dyno size {show(name)}.", hint="sizes: " + ", ".join(SIZES))
    return size
