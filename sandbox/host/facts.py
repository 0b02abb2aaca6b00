"""The few facts about this host that a policy depends on."""

from __future__ import annotations

from typing import NamedTuple


class Host(NamedTuple):
    """``memory_bytes``: all of it. ``swap``: whether any is switched on."""

    memory_bytes: int
    swap: bool


def read() -> Host:
    """From /proc/meminfo: two lines do not pay for an import of psutil at every start."""
    values: dict[str, int] = {}
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            key, _, rest = line.partition(":")
            if key in ("MemTotal", "SwapTotal"):
                values[key] = int(rest.split()[0]) * 1024
    return Host(values["MemTotal"], values.get("SwapTotal", 0) > 0)
