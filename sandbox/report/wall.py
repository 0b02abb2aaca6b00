"""The network wall of one dyno as the kernel has it now: links, routes, the router's sets and rules."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from ipaddress import IPv4Address
from typing import Any, NamedTuple

from sandbox.config import Config
from sandbox.errors import HostError
from sandbox.firewall import admit, router, ruleset
from sandbox.firewall.layout import Layout, Place
from sandbox.host import netns
from sandbox.host.nft import Nft
from sandbox.policy import egress
from sandbox.policy.egress import Reason

_SYSCTLS = (
    ("ipv4/conf/all/accept_source_route", "0"),
    ("ipv4/conf/all/accept_redirects", "0"),
    ("ipv6/conf/all/disable_ipv6", "1"),
)


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
    elements: dict[str, tuple[tuple[str, str], ...]]
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
        missing = []
        for text, reason in egress.ALWAYS_DENIED:
            network = egress.parse_network(text, where="policy")
            if reason in reasons and not self._covered(network.first, network.last):
                missing.append(text)
        return missing

    def _covered(self, first: int, last: int) -> bool:
        at = first
        for start, end, _ in sorted(self.denied):
            if start > at:
                break
            at = max(at, end + 1)
            if at > last:
                return True
        return at > last


class Shared(NamedTuple):
    """What all dynos of an instance have in common: read once for a report of many."""

    faults: tuple[str, ...]
    denied: tuple[tuple[int, int, int], ...]
    hosts: frozenset[str]
    rules: str
    sysctls: tuple[tuple[str, str, str], ...]
    digest: str
    elements: dict[str, tuple[tuple[str, str], ...]]  # by link: (set, the rest of the key) of every element


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
        return Shared(
            faults,
            tuple(_ranges(nft.listing(f"map {ruleset.TABLE} deny4"))),
            frozenset(_addresses(nft.listing(f"set {ruleset.TABLE} hosts4"))),
            _rules(nft),
            sysctls,
            str(router.read_state(layout)["router"]),
            _elements(nft),
        )
    finally:
        nft.close()


def read(config: Config, pid: int, place: Place, port: int, common: Shared) -> Reading:
    """One dyno's own part, beside what is common to all."""
    layout = Layout(config)
    differences = tuple(admit.differences(config, place, pid))
    record = router.read_record(layout.record(place.address))
    with admit.os_open(f"/proc/{pid}/ns/net") as fd, netns.entered(fd), open("/proc/thread-self/net/arp") as file:
        neighbours = tuple(line.split()[0] for line in file.read().splitlines()[1:])
    wanted = _members(record, port) if record else {}
    with router.inside(layout):
        nft = Nft()
    try:
        members = _have(nft, wanted)
    finally:
        nft.close()
    extra = tuple(_beyond(record, common.elements)) if record else ()
    return Reading(differences, neighbours=neighbours, members=members, extra=extra, **common._asdict())


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


def _elements(nft: Nft) -> dict[str, tuple[tuple[str, str], ...]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for which in RIGHTS:
        for item in nft.listing(f"set {ruleset.TABLE} {which}"):
            for element in item.get("set", {}).get("elem", []):
                value = element.get("elem", {}).get("val", element) if isinstance(element, dict) else element
                parts = value["concat"] if isinstance(value, dict) and "concat" in value else [value]
                found.setdefault(str(parts[0]), []).append((which, json.dumps(parts[1:])))
    return {link: tuple(items) for link, items in found.items()}


def _beyond(record: dict[str, Any], elements: dict[str, tuple[tuple[str, str], ...]]) -> Iterator[str]:
    """Elements of the dyno's link that its record does not ask for. Ranges are counted: the kernel spells them anew."""
    wanted = Counter(str(item[0]) for item in record["elements"])
    names = bool(record["egress"]["names"] or record["egress"]["pinned"])
    live: dict[str, list[str]] = {}
    for which, key in elements.get(str(record["link"]), ()):
        live.setdefault(which, []).append(key)
    for which, keys in live.items():
        # What names opened comes and goes with their answers.
        if len(keys) > wanted[which] and not (which == "named4" and names):
            yield from (f"{which} {key}" for key in keys)
    address = str(record["address"])
    for key in live.get("src4", []):
        if json.loads(key) != [address]:
            yield f"src4 {key}"


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


def _members(record: dict[str, Any], port: int) -> dict[str, tuple[str, str]]:
    link, traffic = f'"{record["link"]}"', record["traffic"]
    wanted = {
        "source": ("src4", f"{link} . {record['address']}"),
        "flows": (f"flows_{traffic['flows']}", link),
        "new flows": ("fresh", link),
        "upload": ("upload", link),
        "download": ("download", link),
    }
    if port:
        wanted["inbound"] = ("inbound4", f"{link} . {record['address']} . {port}")
    return wanted


def _have(nft: Nft, wanted: dict[str, tuple[str, str]]) -> dict[str, bool]:
    """Which of those elements are there: asked for all at once, and one by one when that fails."""
    questions = {name: f"get element {ruleset.TABLE} {which} {{ {key} }}\n" for name, (which, key) in wanted.items()}
    try:
        nft.run("".join(questions.values()))
    except HostError:
        return {name: _has(nft, question) for name, question in questions.items()}
    return dict.fromkeys(questions, True)


def _has(nft: Nft, question: str) -> bool:
    try:
        nft.run(question)
    except HostError:
        return False
    return True


def _ranges(listing: list[dict[str, Any]]) -> list[tuple[int, int, int]]:
    found = []
    for item in listing:
        for key, reason in item.get("map", {}).get("elem", []):
            value = key.get("elem", {}).get("val", key) if isinstance(key, dict) else key
            found.append((*_bounds(value), int(reason)))
    return found


def _bounds(value: Any) -> tuple[int, int]:
    if isinstance(value, str):
        return (int(IPv4Address(value)),) * 2
    if "range" in value:
        first, last = value["range"]
        return int(IPv4Address(first)), int(IPv4Address(last))
    base = int(IPv4Address(value["prefix"]["addr"]))
    return base, base + (1 << (32 - int(value["prefix"]["len"]))) - 1


def _addresses(listing: list[dict[str, Any]]) -> list[str]:
    elements = (element for item in listing for element in item.get("set", {}).get("elem", []))
    return [e if isinstance(e, str) else str(e.get("elem", {}).get("val")) for e in elements]
