"""What a dyno may reach over the network: a mode, a list, and the ranges that no list opens.

Pure: text in, frozen values out. Everything that later becomes part of a firewall rule leaves this module as a
number or an ``ipaddress`` value; no text of a customer goes any further, except names that were checked letter by
letter.
"""

from __future__ import annotations

import bisect
import ipaddress
import itertools
from collections.abc import Iterable, Iterator
from enum import Enum, IntEnum
from typing import NamedTuple

from sandbox.errors import PolicyError
from sandbox.units import show

RESOLVER = "172.16.0.23"  # the address that Heroku's dynos find in /etc/resolv.conf
MAX_ENTRIES = 1000  # the kernel copies a set of ranges as a whole at every change
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-")


class Mode(Enum):
    """NONE: nothing. PUBLIC: the internet, and nothing local. ALLOW: what is on the list."""

    NONE = "none"
    PUBLIC = "public"
    ALLOW = "allow"


class Reason(IntEnum):
    """Why a packet was denied; the number is the packet's mark while the kernel counts it."""

    HOST = 1
    DYNO = 2
    METADATA = 3
    PRIVATE = 4
    SHARED = 5
    LINK_LOCAL = 6
    LOOPBACK = 7
    MULTICAST = 8
    BROADCAST = 9
    RESERVED = 10
    OPERATOR = 11
    SPOOFED = 16
    IPV6 = 17
    PROTOCOL = 18
    SMTP = 19
    NOT_LISTED = 20
    EGRESS_NONE = 21
    DNS = 22
    DNS_RATE = 23
    NEW_RATE = 24
    CONNECTIONS = 25
    BANDWIDTH = 26

    @property
    def rule(self) -> str:
        """The word in logs: ``rule=link-local``."""
        return self.name.lower().replace("_", "-")


# Cloud metadata services; each lies in a denied range, but its own name tells more. Sources: the clouds' documentation
# (AWS, GCP, Azure, DigitalOcean 169.254.169.254; ECS 169.254.170.2; EKS .23; Azure 168.63.129.16; Alibaba
# 100.100.100.200; Oracle 192.0.0.192).
METADATA = ("169.254.169.254", "169.254.170.2", "169.254.170.23", "168.63.129.16", "100.100.100.200", "192.0.0.192")
# IANA's special-purpose registry (RFC 6890 and updates), IPv4; first match wins.
ALWAYS_DENIED: tuple[tuple[str, Reason], ...] = (
    *((address, Reason.METADATA) for address in METADATA),
    ("10.0.0.0/8", Reason.PRIVATE),
    ("172.16.0.0/12", Reason.PRIVATE),
    ("192.168.0.0/16", Reason.PRIVATE),
    ("100.64.0.0/10", Reason.SHARED),
    ("169.254.0.0/16", Reason.LINK_LOCAL),
    ("127.0.0.0/8", Reason.LOOPBACK),
    ("224.0.0.0/4", Reason.MULTICAST),
    ("255.255.255.255/32", Reason.BROADCAST),
    ("0.0.0.0/8", Reason.RESERVED),
    ("192.0.0.0/24", Reason.RESERVED),
    ("192.0.2.0/24", Reason.RESERVED),
    ("192.88.99.0/24", Reason.RESERVED),
    ("198.18.0.0/15", Reason.RESERVED),
    ("198.51.100.0/24", Reason.RESERVED),
    ("203.0.113.0/24", Reason.RESERVED),
    ("240.0.0.0/4", Reason.RESERVED),
)

Range = tuple[int, int]
Ports = tuple[Range, ...]
ALL_PORTS: Ports = ((0, 65535),)


class Network(NamedTuple):
    """Addresses ``first`` to ``last`` as numbers, on ``ports`` of TCP and UDP."""

    first: int
    last: int
    ports: Ports = ALL_PORTS

    def __str__(self) -> str:
        ports = "" if self.ports == ALL_PORTS else ":" + ",".join(_span(ports) for ports in self.ports)
        return f"{cidrs(self.first, self.last)}{ports}"


class Egress(NamedTuple):
    """What one dyno may reach. ``permitted``: of ``networks``, those in denied ranges that the operator opened."""

    mode: Mode = Mode.PUBLIC
    networks: tuple[Network, ...] = ()
    names: tuple[str, ...] = ()
    smtp: bool = False
    permitted: tuple[Network, ...] = ()
    # Names whose addresses the operator's own resolver gave: of the package index, for the fetch step of a build.
    pinned: tuple[tuple[str, str], ...] = ()

    def document(self) -> dict[str, object]:
        """The value as JSON: for digests, records and reports."""
        return {
            "mode": self.mode.value,
            "networks": [str(network) for network in self.networks],
            "names": list(self.names),
            "smtp": self.smtp,
            "permitted": [str(network) for network in self.permitted],
            "pinned": [list(pair) for pair in self.pinned],
        }

    @property
    def policed(self) -> bool:
        """Whether its questions are checked one by one, instead of going straight to the resolver."""
        return self.mode is Mode.ALLOW or bool(self.pinned)

    def resolv_conf(self) -> str:
        """Our resolver, or nobody: without a line the C library asks the dyno's own loopback and is refused at once."""
        if not self.resolves:
            return "# egress none: no name resolves\n"
        return f"nameserver {RESOLVER}\noptions timeout:3 attempts:2\n"

    @property
    def resolves(self) -> bool:
        """Whether any name resolves at all."""
        return self.mode is Mode.PUBLIC or bool(self.names or self.pinned)


NOTHING = Egress(Mode.NONE)


def make(
    mode: str,
    entries: Iterable[str] = (),
    *,
    smtp: bool = False,
    deny: Iterable[Network] = (),
    permit: Iterable[Network] = (),
    where: str = "--egress",
) -> Egress:
    """The egress of a mode and a list of ``CIDR[:ports]`` and domain names.

    ``deny`` and ``permit`` are the operator's. An entry inside a denied range is refused unless ``permit`` covers it;
    a larger entry that contains denied ranges stands, and they stay denied in it. Raises PolicyError with ``where``.
    """
    known = {item.value: item for item in Mode}
    if mode not in known:
        raise PolicyError(
            f"{where}: there is no egress mode {show(mode)}.",
            hint="modes: public, none, or allow with a list: allow:203.0.113.7/32:443,api.example.com",
        )
    texts = list(entries)
    if known[mode] is not Mode.ALLOW:
        if texts:
            raise PolicyError(f"{where}: a list goes with mode allow, not with {mode}.", hint="leave one of them away.")
        return Egress(known[mode], smtp=smtp)
    if not texts:
        raise PolicyError(f"{where}: mode allow has an empty list.", hint="name what is allowed, or use none.")
    networks, names = [], []
    for text in texts:
        entry = parse_entry(text, where=where)
        if isinstance(entry, str):
            names.append(entry)
        else:
            networks.append(entry)
    merged, unique = disjoint(networks), tuple(sorted(set(names)))
    count = sum(len(network.ports) for network in merged) + len(unique)
    if count > MAX_ENTRIES:
        raise PolicyError(
            f"{where}: the list has {count} entries, ranges of ports counted, at most {MAX_ENTRIES}.",
            hint="use larger networks or wildcards.",
        )
    opened = tuple(permit)
    denied = denied_ranges(deny=deny)
    permitted = []
    for network in merged:
        inside = _inside(network, denied)
        if inside is None:
            continue
        if not _covered(network, opened):
            raise PolicyError(
                f"{where}: {network} lies in {cidrs(inside.first, inside.last)}, which is always denied "
                f"({inside.reason.rule}).",
                hint=f'the operator can permit it: permit = ["{network}"] in /etc/sandbox/config.toml.',
            )
        permitted.append(network)
    return Egress(Mode.ALLOW, merged, unique, smtp, tuple(permitted))


def split(listed: str) -> list[str]:
    """The entries of a comma-separated list. Ports have commas too: a number alone belongs to the entry before it."""
    found: list[str] = []
    for part in listed.split(","):
        if found and ":" in found[-1] and part and set(part) <= set("0123456789-"):
            found[-1] += "," + part
        else:
            found.append(part)
    return found


def parse_entry(text: str, *, where: str) -> Network | str:
    """A network with ports, or a domain name in lower case."""
    entry = text.strip()
    if "://" in entry:
        raise PolicyError(f"{where}: {show(entry)} has a scheme.", hint="write the host name alone: api.example.com")
    head, colon, ports = entry.partition(":")
    if ":" in ports or entry.startswith("["):
        raise PolicyError(
            f"{where}: {show(entry)} is not an IPv4 network.", hint="IPv6 is denied as a whole; name IPv4 networks."
        )
    if head and set(head) <= set("0123456789./"):
        return parse_network(entry, where=where)
    if colon:
        raise PolicyError(
            f"{where}: {show(entry)}: ports go with networks, not with names.", hint="write the name alone."
        )
    return parse_name(entry, where=where)


def parse_network(text: str, *, where: str) -> Network:
    """``CIDR[:ports]``; ports as ``443``, ``80,443`` or ``8000-8100``, of TCP and UDP alike."""
    body, colon, tail = text.strip().partition(":")
    try:
        network = ipaddress.IPv4Network(body)
    except ValueError as error:
        raise PolicyError(
            f"{where}: {show(body)} is not an IPv4 network: {show(str(error))}.",
            hint="write ADDRESS/PREFIX[:PORTS], such as 192.0.43.0/24:443.",
        ) from error
    ports = _ports(tail, where) if colon else ALL_PORTS
    return Network(int(network.network_address), int(network.broadcast_address), ports)


def _ports(text: str, where: str) -> Ports:
    spans = []
    for part in text.replace("+", ",").split(","):
        first, dash, last = part.partition("-")
        if not all(
            piece.isascii() and piece.isdigit() and len(piece) < 6 for piece in ((first, last) if dash else (first,))
        ):
            raise PolicyError(f"{where}: {show(part)} is not a port.", hint="ports: 443, 80+443 or 8000-8100.")
        low, high = int(first), int(last or first)
        if not 1 <= low <= high <= 65535:
            raise PolicyError(f"{where}: port {show(part)} is not between 1 and 65535.")
        spans.append((low, high))
    return _union(spans)


def parse_name(text: str, *, where: str) -> str:
    """A domain name, or ``*.`` and one: every name below it, not the name itself."""
    name = text.lower().removesuffix(".")
    body = name.removeprefix("*.")
    labels = body.split(".")
    if "*" in body:
        raise PolicyError(
            f"{where}: {show(text)}: a wildcard stands for the leftmost labels only.",
            hint="*.example.com means every name below example.com; example.com itself is an entry of its own.",
        )
    good = (
        len(labels) >= 2
        and len(body) <= 253
        and not labels[-1].isdigit()
        and all(0 < len(label) < 64 and _LETTERS.issuperset(label) and label.strip("-") == label for label in labels)
    )
    if not good:
        raise PolicyError(
            f"{where}: {show(text)} is neither an IPv4 network nor a domain name.",
            hint="names: api.example.com or *.example.com (international ones as xn--...).",
        )
    return name


def name_allowed(name: str, names: Iterable[str]) -> bool:
    """Whether a name in lower case and without the last dot is on the list."""
    if name in names:
        return True
    labels = name.split(".")
    return any("*." + ".".join(labels[start:]) in names for start in range(1, len(labels)))


class Denied(NamedTuple):
    """A range that no list opens, and why."""

    first: int
    last: int
    reason: Reason


def denied_ranges(
    *, pool: str | None = None, hosts: Iterable[str] = (), deny: Iterable[Network] = ()
) -> tuple[Denied, ...]:
    """Every denied range of IPv4, disjoint and in order.

    Where ranges overlap, the more telling reason wins: the host's own address in a private network is ``host``.
    """
    wishes: list[tuple[int, int, Reason]] = []
    wishes += [(int(ipaddress.IPv4Address(host)),) * 2 + (Reason.HOST,) for host in hosts]
    if pool is not None:
        net = ipaddress.IPv4Network(pool)
        wishes.append((int(net.network_address), int(net.broadcast_address), Reason.DYNO))
    for text, reason in ALWAYS_DENIED:
        net = ipaddress.IPv4Network(text)
        wishes.append((int(net.network_address), int(net.broadcast_address), reason))
    wishes += [(network.first, network.last, Reason.OPERATOR) for network in deny]
    found: list[Denied] = []
    starts: list[int] = []
    for first, last, reason in wishes:
        for low, high in list(_free(first, last, found, starts)):
            index = bisect.bisect(starts, low)
            found.insert(index, Denied(low, high, reason))
            starts.insert(index, low)
    return tuple(found)


def _free(first: int, last: int, found: list[Denied], starts: list[int]) -> Iterator[Range]:
    """The parts of first..last that no range in ``found`` has yet."""
    index = max(0, bisect.bisect(starts, first) - 1)
    position = first
    while index < len(found) and found[index].first <= last:
        taken = found[index]
        if taken.first > position:
            yield position, taken.first - 1
        position = max(position, taken.last + 1)
        index += 1
    if position <= last:
        yield position, last


def reason_of(address: str, ranges: tuple[Denied, ...]) -> Reason | None:
    """Why that address is denied, or None."""
    value = int(ipaddress.IPv4Address(address))
    index = bisect.bisect(ranges, value, key=lambda item: item.first) - 1
    if index >= 0 and ranges[index].last >= value:
        return ranges[index].reason
    return None


def disjoint(networks: Iterable[Network]) -> tuple[Network, ...]:
    """The same addresses and ports without overlaps: the kernel refuses a set of ranges that overlap."""
    items = list(networks)
    cuts = sorted({item.first for item in items} | {item.last + 1 for item in items})
    opens: dict[int, list[Network]] = {}
    for item in items:
        opens.setdefault(item.first, []).append(item)
    active: list[Network] = []
    found: list[Network] = []
    for low, after in itertools.pairwise(cuts):
        active = [item for item in active if item.last >= low] + opens.get(low, [])
        if not active:
            continue
        # Equal entries are the common case of a long list.
        spans = {span for item in active for span in item.ports}
        ports = _union(spans)
        if found and found[-1].last == low - 1 and found[-1].ports == ports:
            found[-1] = Network(found[-1].first, after - 1, ports)
        else:
            found.append(Network(low, after - 1, ports))
    return tuple(found)


def _union(spans: Iterable[Range]) -> Ports:
    merged: list[Range] = []
    for low, high in sorted(spans):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return tuple(merged)


def _inside(network: Network, denied: tuple[Denied, ...]) -> Denied | None:
    """The denied range in which the network begins, if denied ranges cover all of it."""
    begin: Denied | None = None
    position = network.first
    for item in denied:
        if item.first <= position <= item.last:
            begin = begin or item
            position = item.last + 1
            if position > network.last:
                return begin
    return None


def _covered(network: Network, opened: tuple[Network, ...]) -> bool:
    return any(
        item.first <= network.first
        and network.last <= item.last
        and all(any(low <= a and b <= high for low, high in item.ports) for a, b in network.ports)
        for item in opened
    )


def cidrs(first: int, last: int) -> str:
    """A range for people: a prefix where it is one."""
    start, end = ipaddress.IPv4Address(first), ipaddress.IPv4Address(last)
    networks = list(ipaddress.summarize_address_range(start, end))
    return str(networks[0]) if len(networks) == 1 else f"{start}-{end}"


def _span(ports: Range) -> str:
    return str(ports[0]) if ports[0] == ports[1] else f"{ports[0]}-{ports[1]}"


def prefixes(ranges: Iterable[Denied]) -> list[str]:
    """The ranges as few prefixes, whatever their reasons."""
    pieces = (
        piece
        for item in ranges
        for piece in ipaddress.summarize_address_range(
            ipaddress.IPv4Address(item.first), ipaddress.IPv4Address(item.last)
        )
    )
    return [str(network) for network in ipaddress.collapse_addresses(pieces)]
