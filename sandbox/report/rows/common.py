"""Small pieces that the rows of every area are made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sandbox.errors import HostError
from sandbox.report.facts import Facts
from sandbox.report.model import Fact, Tier

Calls = tuple[tuple[str, tuple[int, ...]], ...]
STOP_S = 10.0  # also where the processor is emulated; a stop that waits for anybody waits 30 s


def calls(*names: str) -> Calls:
    """Calls that are refused whatever their arguments are; the sweep of all arguments is PRV-10."""
    return tuple((name, ()) for name in names)


def kernel(what: str, promised: object, observed: object, *, holds: bool | None, why: str = "") -> Fact:
    return Fact(Tier.KERNEL, what, str(promised), str(observed), holds, why)


def host(what: str, promised: object, observed: object, *, holds: bool | None, why: str = "") -> Fact:
    return Fact(Tier.HOST, what, str(promised), str(observed), holds, why)


def twin(what: str, promised: object, observed: object, *, holds: bool | None, why: str = "") -> Fact:
    return Fact(Tier.TWIN, what, str(promised), str(observed), holds, why)


def absent(what: str, observed: str, why: str) -> Fact:
    """The feature does not exist on this host; ``observed`` is how we know."""
    return Fact(Tier.HOST, what, "", observed, None, why, absent=True)


def rlimit(facts: Facts, name: str) -> Iterator[Fact]:
    """A resource limit of every process: at most what was promised, an app may lower it."""
    wanted = next(limit for limit in facts.spec.policy.rlimits if limit.name == name)
    hard = [found[name][1] for found in facts.subject.rlimits]
    if not hard:
        raise HostError("no process to examine.")
    worst = -1 if min(hard) < 0 else max(hard)
    holds = 0 <= worst <= wanted.hard
    yield kernel(f"RLIMIT_{name}", wanted.hard, "unlimited" if worst < 0 else worst, holds=holds)


def read_host(path: str) -> str | None:
    """A small file of the host; None when this kernel does not have it."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except (FileNotFoundError, NotADirectoryError):
        return None


def switch(path: str, good: tuple[str, ...], why: str) -> Iterator[Fact]:
    """A switch of the host below /proc/sys or /sys."""
    value = read_host(path)
    if value is None:
        yield absent(path, "no such file", why)
    else:
        yield host(path, " or ".join(good), value, holds=value in good)


def counted(text: str) -> tuple[str, int]:
    """The prober's "EAGAIN 251", or "no end 320"."""
    word, _, number = text.rpartition(" ")
    return word, int(number)


def measured(facts: Facts, key: str) -> Any:
    """What the twin's session measured under that key; None when there was none."""
    return facts.measured.get(key)


def network(facts: Facts, row: str) -> Iterator[Fact]:
    """Attempts over the network: nobody may have seen them, and the kernel must have counted them."""
    if facts.attempts is not None and facts.record.place is not None and row not in facts.measured:
        yield Fact(Tier.NETWORK, "packets", "nobody sees them", "none was sent", None, "no packet was sent")
    for attempt in measured(facts, row) or ():
        seen, denied, rule = attempt["seen"], attempt["denied"], attempt["rule"]
        promised = f"nobody sees it, counted as {rule}"
        if seen:
            yield Fact(Tier.NETWORK, attempt["what"], promised, f"ARRIVED ({attempt['denied']} denied)", holds=False)
        elif not denied:
            why = "nobody saw it, but no counter rose: something else may have stopped it"
            yield Fact(Tier.NETWORK, attempt["what"], promised, "nobody saw it, nothing counted", None, why)
        else:
            yield Fact(Tier.NETWORK, attempt["what"], promised, f"nobody saw it, rule={rule} +{denied}", holds=True)
