"""The network wall of one dyno as the kernel has it now: links, routes, the router's sets and rules."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from functools import cache
from ipaddress import IPv4Address
from typing import Any, NamedTuple

from sandbox.config import Config
from sandbox.errors import HostError
from sandbox.firewall import admit, router, ruleset
from sandbox.firewall.layout import Layout, Place
from sandbox.host import netns
from sandbox.host.nft import Nft, elements
from sandbox.policy import egress
from sandbox.policy.egress import Reason

_SYSCTLS = (
    ("ipv4/conf/all/accept_source_route", "0"),
    ("ipv4/conf/all/accept_redirects", "0"),
    ("ipv6/conf/all/disable_ipv6", "1"),
)

# An element of a set: its name, and the key without the link that the key begins with.
Right = tuple[str, tuple[str, ...]]


class Reading(NamedTuple):
    """``differences``: of the dyno's own place; ``faults``: of the whole wall; ``denied``: the live set's ranges."""

    differences: tuple[tuple[str, str], ...]
    faults: tuple[str, ...]
    denied: tuple[tuple[int, int, int], ...]
    hosts: frozenset[str]
    rules: str
    neighbours: tuple[str, ...]
    sysctls: tuple[tuple[str, str, str], ...]
    members: dict[str, bool]
    digest: str
    elements: dict[str, tuple[Right, ...]]
    extra: tuple[str, ...]

    def covers(self, address: str) -> bool:
        """Whether the live sets deny that address."""
        number = int(IPv4Address(address))
        return address in self.hosts or any(first <= number <= last for first, last, _ in self.denied)

    def covers_all(self, network: str) -> bool:
        """Whether the live set denies every address of a network."""
        item = egress.parse_network(network, where="pool")
        return self._covered(item.first, item.last)

    def misses(self, reasons: frozenset[Reason]) -> list[str]:
        """The ranges of those reasons that the policy denies and the live set does not, completely."""
        return [text for text, reason, first, last in _always() if reason in reasons and not self._covered(first, last)]

    def _covered(self, first: int, last: int) -> bool:
        at = first
        for start, end, _ in sorted(self.denied):
            if start > at:
                break
            at = max(at, end + 1)
            if at > last:
                return True
        return at > last


@cache
def _always() -> tuple[tuple[str, Reason, int, int], ...]:
    parsed = ((text, reason, egress.parse_network(text, where="policy")) for text, reason in egress.ALWAYS_DENIED)
    return tuple((text, reason, network.first, network.last) for text, reason, network in parsed)


class Shared(NamedTuple):
    """What all dynos of an instance have in common: read once for a report of many."""

    faults: tuple[str, ...]
    denied: tuple[tuple[int, int, int], ...]
    hosts: frozenset[str]
    rules: str
    sysctls: tuple[tuple[str, str, str], ...]
    digest: str
    elements: dict[str, tuple[Right, ...]]  # by link


def shared(config: Config) -> Shared:
    """The router's table and the host's part of the wall. HostError when there is no router."""
    layout = Layout(config)
    if not router.standing(layout):
        raise HostError("the router is gone.", hint="sandbox firewall show")
    forwarding = any(record["egress"]["mode"] != "none" for record in router.records(layout))
    faults = tuple(router.faults(layout, forwarding=forwarding))
    with router.inside(layout):
        nft = Nft()
        sysctls = tuple((name, value, _sysctl(name)) for name, value in _SYSCTLS)
    try:
        # One dump of the table: each listing of a set reads the whole table anyhow.
        table = nft.listing(f"table {ruleset.TABLE}")
        return Shared(
            faults,
            tuple(_ranges(table)),
            frozenset(str(key[0]) for item in table if _named(item, "hosts4") for key, _ in elements(item)),
            _rules(nft),
            sysctls,
            str(router.read_state(layout)["router"]),
            _by_link(table),
        )
    finally:
        nft.close()


def read(config: Config, pid: int, place: Place, common: Shared) -> Reading:
    """One dyno's own part, beside what is common to all."""
    layout = Layout(config)
    differences = list(admit.own_differences(place, pid))
    record = router.read_record(layout.record(place.address))
    with admit.os_open(f"/proc/{pid}/ns/net") as fd, netns.entered(fd), open("/proc/thread-self/net/arp") as file:
        neighbours = tuple(line.split()[0] for line in file.read().splitlines()[1:])
    members: dict[str, bool] = {}
    extra: tuple[str, ...] = ()
    if record is None:
        differences.append(("a record of its place", "none"))
    else:
        live = common.elements.get(str(record["link"]), ())
        items = router.record_elements(record)
        missing = [item for item in items if _plain(item) not in live]
        # The kernel spells ranges anew: it is asked for those that are not there as we wrote them.
        missing = _unknown(layout, missing) if missing else []
        differences += [(f"known to the router as {item.set} {item.key}", "unknown") for item in missing]
        members = {_MEMBERS.get(item.set.partition("_")[0], item.set): item not in missing for item in items}
        extra = tuple(_beyond(record, live))
    return Reading(tuple(differences), neighbours=neighbours, members=members, extra=extra, **common._asdict())


# What the rows call the sets that they ask for.
_MEMBERS = {"src4": "source", "flows": "flows", "fresh": "new flows", "inbound4": "inbound"}


def _plain(item: ruleset.Element) -> Right:
    """An element as we wrote it, in the form of the dump."""
    return item.set, tuple(item.key.split(" . ")[1:])


def _unknown(layout: Layout, items: list[ruleset.Element]) -> list[ruleset.Element]:
    with router.inside(layout):
        nft = Nft()
    try:
        return admit.unknown(nft, items)
    finally:
        nft.close()


# Each element of these is a right of the link that its key begins with.
RIGHTS = (
    "src4",
    "public",
    "allowing",
    "policed",
    "resolve",
    "smtp",
    "permit4",
    "allow4",
    "named4",
    "reply4",
    "inbound4",
)
_LIMITS = ("dyno", "fresh", "upload", "download")


def _named(item: dict[str, Any], name: str) -> bool:
    return bool(item.get("set", item.get("map", {})).get("name") == name)


def _by_link(table: list[dict[str, Any]]) -> dict[str, tuple[Right, ...]]:
    """The elements of every set and map that are keyed by a link."""
    found: dict[str, list[Right]] = {}
    for item in table:
        for kind in item.keys() & {"set", "map"}:
            which = str(item[kind]["name"])
            if which in (*RIGHTS, *_LIMITS) or which.startswith("flows_"):
                for key, _ in elements(item, kind):
                    found.setdefault(str(key[0]), []).append((which, tuple(_spelled(part) for part in key[1:])))
    return {link: tuple(items) for link, items in found.items()}


def _spelled(part: Any) -> str:
    return part if isinstance(part, str) else json.dumps(part)


def _beyond(record: dict[str, Any], elements: tuple[Right, ...]) -> Iterator[str]:
    """Elements of the dyno's link that its record does not ask for. Ranges are counted: the kernel spells them anew."""
    wanted = Counter(str(item[0]) for item in record["elements"])
    names = bool(record["egress"]["names"] or record["egress"]["pinned"])
    live: dict[str, list[tuple[str, ...]]] = {}
    for which, key in elements:
        if which in RIGHTS:
            live.setdefault(which, []).append(key)
    for which, keys in live.items():
        # What names opened comes and goes with their answers.
        if len(keys) > wanted[which] and not (which == "named4" and names):
            yield from (f"{which} {' . '.join(key)}" for key in keys)
    address = str(record["address"])
    for key in live.get("src4", []):
        if key != (address,):
            yield f"src4 {' . '.join(key)}"


def _sysctl(name: str) -> str:
    try:
        return netns.read_sysctl(name)
    except FileNotFoundError:
        return "absent"


def _rules(nft: Nft) -> str:
    """The rules as text, without the elements of the sets: those are read by themselves."""
    try:
        return nft.text(f"table {ruleset.TABLE}", terse=True)
    except HostError:
        return ""


def _ranges(table: list[dict[str, Any]]) -> list[tuple[int, int, int]]:
    denied = (pair for item in table if _named(item, "deny4") for pair in elements(item, "map"))
    return [(*_bounds(key[0]), int(body["data"])) for key, body in denied]


def _bounds(value: Any) -> tuple[int, int]:
    if isinstance(value, str):
        return (int(IPv4Address(value)),) * 2
    if "range" in value:
        first, last = value["range"]
        return int(IPv4Address(first)), int(IPv4Address(last))
    base = int(IPv4Address(value["prefix"]["addr"]))
    return base, base + (1 << (32 - int(value["prefix"]["len"]))) - 1
