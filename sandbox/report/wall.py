"""The network wall of one dyno as the kernel has it now: links, routes, the router's sets and rules."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cache
from ipaddress import IPv4Address
from typing import Any, NamedTuple

from sandbox.config import Config
from sandbox.errors import HostError
from sandbox.firewall import admit, router, ruleset
from sandbox.firewall.layout import TABLE, Layout, Place
from sandbox.host import netns
from sandbox.host.netlink import MAIN, Netlink, Rule
from sandbox.host.nft import Nft, elements
from sandbox.policy import egress
from sandbox.policy.egress import Reason
from sandbox.units import escape

_SYSCTLS = (
    ("ipv4/conf/all/accept_source_route", "0"),
    ("ipv4/conf/all/accept_redirects", "0"),
    ("ipv6/conf/all/disable_ipv6", "1"),
)

# Of a dyno's own network namespace.
_OWN_SYSCTLS = (("ipv4/ip_unprivileged_port_start", "1024"), ("ipv4/ping_group_range", "1\t0"))

# An element of a set: its name, the key without the link that it begins with, and its own limit or a map's value.
Right = tuple[str, tuple[str, ...], str]


class Reading(NamedTuple):
    """``differences``: of the dyno's own place; ``faults``: of the whole wall; ``denied``: the live set's ranges."""

    differences: tuple[tuple[str, str], ...]
    faults: tuple[str, ...]
    denied: tuple[tuple[int, int, int], ...]
    hosts: frozenset[str]
    rules: str
    neighbours: tuple[str, ...]
    sysctls: tuple[tuple[str, str, str], ...]
    own_sysctls: dict[str, tuple[str, str]]  # promised, observed
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
    faults = (*router.faults(layout, forwarding=forwarding), *_strangers(layout))
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


# What every network namespace begins with: the tables local, main and default.
_LOCAL = 255
_KERNEL_RULES = (Rule(0, _LOCAL), Rule(32766, MAIN), Rule(32767, 253))


def _strangers(layout: Layout) -> Iterator[str]:
    """What is in the router and is not ours: tables, routing rules and routes. Nobody else has any business there."""
    before = _addresses(layout)
    with router.inside(layout):
        net, nft = Netlink(), Nft()
    try:
        tables = [item["table"] for item in nft.listing("tables") if "table" in item]
        rules, routes = net.rules(), net.routes()
    finally:
        net.close()
        nft.close()
    for table in tables:
        if (name := f"{table['family']} {table['name']}") not in (ruleset.TABLE, "arp sandbox"):
            yield escape(f"foreign table {name}")
    for rule in rules:
        if rule not in (*_KERNEL_RULES, *router.RULES):
            yield f"foreign routing rule {rule.priority}"
    # A dyno that comes or goes at this moment has its record for longer than its route.
    dynos = {f"{address}/32" for address in before | _addresses(layout)}
    for route in routes:
        own = route.table == TABLE and route.prefix in {"0.0.0.0/0", f"{layout.host_address}/32", *dynos}
        if route.table != _LOCAL and not own:
            yield f"foreign route {route.prefix} in table {route.table}"


def _addresses(layout: Layout) -> set[str]:
    return {name.removesuffix(".json") for name in os.listdir(layout.records) if name.endswith(".json")}


def read(config: Config, pid: int, place: Place, common: Shared) -> Reading:
    """One dyno's own part, beside what is common to all."""
    layout = Layout(config)
    differences = list(admit.own_differences(place, pid))
    record = router.read_record(layout.record(place.address))
    with admit.os_open(f"/proc/{pid}/ns/net") as fd, netns.entered(fd), open("/proc/thread-self/net/arp") as file:
        neighbours = tuple(line.split()[0] for line in file.read().splitlines()[1:])
        own_sysctls = {name: (wanted, _sysctl(name)) for name, wanted in _OWN_SYSCTLS}
    members: dict[str, bool] = {}
    extra: tuple[str, ...] = ()
    if record is None:
        differences.append(("a record of its place", "none"))
    else:
        differences += admit.wired(layout, str(record["link"]), pid)
        live = common.elements.get(str(record["link"]), ())
        items = router.record_elements(record)
        missing = [item for item in items if _plain(item) not in live]
        differences += [(f"known to the router as {_shown(_plain(item))}", _instead(item, live)) for item in missing]
        members = {_MEMBERS.get(item.set.partition("_")[0], item.set): item not in missing for item in items}
        extra = tuple(_beyond(record, live))
    return Reading(
        tuple(differences),
        neighbours=neighbours,
        own_sysctls=own_sysctls,
        members=members,
        extra=extra,
        **common._asdict(),
    )


# What the rows call the sets that they ask for.
_MEMBERS = {"src4": "source", "flows": "flows", "fresh": "new flows", "inbound4": "inbound"}


def _plain(item: ruleset.Element) -> Right:
    """An element as we wrote it, in the form of the dump."""
    found = re.fullmatch(r"limit rate over (\d+)(?: bytes)?/second burst (\d+) \w+", item.more)
    more = f"{found[1]}/second burst {found[2]}" if found else item.more.removeprefix(": ")
    return item.set, tuple(item.key.split(" . ")[1:]), more


def _shown(right: Right) -> str:
    which, key, more = right
    return " ".join(filter(None, (which, " . ".join(key), more)))


def _instead(item: ruleset.Element, live: tuple[Right, ...]) -> str:
    """What the router has in an element's place: the same key with another limit or value, or nothing."""
    which, key, _ = _plain(item)
    return next((_shown(right) for right in live if right[:2] == (which, key)), "unknown")


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
                for key, body in elements(item, kind):
                    right = which, _spelled(key), _more(body)
                    found.setdefault(str(key[0]), []).append(right)
    return {link: tuple(items) for link, items in found.items()}


_PROTOCOLS = {6: "tcp", 17: "udp"}
_UNITS = {"kbytes": 1 << 10, "mbytes": 1 << 20}


def _spelled(key: list[Any]) -> tuple[str, ...]:
    """A key without its link, as ``ruleset`` writes it: the kernel spells ranges and protocols anew."""
    found = []
    for position, part in enumerate(key[1:], 1):
        if isinstance(part, dict) and "prefix" in part:
            first, last = _bounds(part)
            found.append(f"{IPv4Address(first)}-{IPv4Address(last)}")
        elif isinstance(part, dict) and "range" in part:
            found.append("-".join(map(str, part["range"])))
        else:
            # link . address . protocol . port
            found.append(str(_PROTOCOLS.get(part, part) if position == 2 else part))
    return tuple(found)


def _more(body: dict[str, Any]) -> str:
    if limit := body.get("limit"):
        rate, burst = (limit[name] * _UNITS.get(limit.get(f"{name}_unit", ""), 1) for name in ("rate", "burst"))
        return f"{rate}/{limit['per']} burst {burst}" if limit.get("inv") else f"{rate}, not over"
    return str(body.get("data", ""))


def _beyond(record: dict[str, Any], elements: tuple[Right, ...]) -> Iterator[str]:
    """Elements of the dyno's link that its record does not ask for."""
    wanted = {_plain(item)[:2] for item in router.record_elements(record)}
    names = bool(record["egress"]["names"] or record["egress"]["pinned"])
    for right in elements:
        # What names opened comes and goes with their answers.
        if right[0] in RIGHTS and right[:2] not in wanted and not (right[0] == "named4" and names):
            yield _shown(right)


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
