"""rtnetlink in one network namespace: links, addresses, routes, rules and neighbours, as numbers and not as text.

Only what a dyno's network needs. iproute2 would take a process per namespace and batch, which is most of the time
that an admission may take.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Interface
from typing import NamedTuple

# linux/netlink.h, linux/rtnetlink.h
_REQUEST, _ACK, _EXCL, _CREATE, _DUMP = 1, 4, 0x200, 0x400, 0x300
_NEWLINK, _DELLINK, _GETLINK, _NEWADDR, _GETADDR = 16, 17, 18, 20, 22
_NEWROUTE, _DELROUTE, _GETROUTE, _NEWNEIGH, _NEWRULE, _DELRULE, _GETRULE = 24, 25, 26, 28, 32, 33, 34
IFF_UP, IFF_NOARP = 0x1, 0x80
# linux/if_link.h
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_LINKINFO, _IFLA_NET_NS_FD, _IFLA_GROUP = 1, 3, 18, 28, 27
_IFLA_INFO_KIND, _IFLA_INFO_DATA, _VETH_INFO_PEER = 1, 2, 1
_IFLA_LINK, _IFLA_LINK_NETNSID = 5, 37
# linux/net_namespace.h
_GETNSID, _NETNSA_NSID, _NETNSA_FD = 90, 1, 3
# linux/if_addr.h, linux/rtnetlink.h, linux/neighbour.h, linux/fib_rules.h
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS, _NOPREFIXROUTE = 1, 2, 8, 0x200
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC, _RTA_TABLE = 1, 4, 5, 6, 7, 15
_NDA_DST, _NDA_LLADDR, _NUD_PERMANENT = 1, 2, 0x80
_FRA_DST, _FRA_IIFNAME, _FRA_PRIORITY, _FRA_FWMARK, _FRA_TABLE, _FRA_FWMASK = 1, 3, 6, 10, 15, 16
MAIN = 254
# RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV4_ROUTE, RTNLGRP_IPV4_RULE, as masks for bind.
ADDRESSES, ROUTES, RULES = 1 << 4, 1 << 6, 1 << 7
_UNICAST, _UNREACHABLE, _SCOPE_LINK, _SCOPE_UNIVERSE, _PROTO_STATIC = 1, 7, 253, 0, 4


class Route(NamedTuple):
    """One IPv4 route: ``prefix`` as text, the table, the index of its device (0: none) and its metric."""

    prefix: str
    table: int
    device: int
    metric: int = 0


class Rule(NamedTuple):
    """One IPv4 policy routing rule, as far as ours go."""

    priority: int
    table: int
    mark: int = 0
    iif: str = ""
    to: str = ""


def _attribute(kind: int, data: bytes) -> bytes:
    length = 4 + len(data)
    return struct.pack("=HH", length, kind) + data + bytes(-length % 4)


def _name(text: str) -> bytes:
    return text.encode("ascii") + b"\0"


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The attributes of a message: type without its flags, and content."""
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if length < 4:
            return
        yield kind & 0x3FFF, data[4:length]
        data = data[(length + 3) & ~3 :]


def open_events(groups: int) -> socket.socket:
    """A socket that hears of changes in the caller's network namespace: ADDRESSES, ROUTES, RULES."""
    link = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    link.bind((0, groups))
    link.setblocking(False)
    return link


class Netlink:
    """A route socket of the network namespace in which it was made. Errors are OSError that name the object."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.bind((0, 0))
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def _request(self, kind: int, flags: int, body: bytes, what: str) -> list[tuple[int, bytes]]:
        self._sequence += 1
        head = struct.pack("=IHHII", 16 + len(body), kind, flags | _REQUEST, self._sequence, 0)
        self._socket.send(head + body)
        found: list[tuple[int, bytes]] = []
        while True:
            data = self._socket.recv(1 << 18)
            while len(data) >= 16:
                length, answer, _, sequence, _ = struct.unpack_from("=IHHII", data)
                content, data = data[16:length], data[(length + 3) & ~3 :]
                if sequence != self._sequence:
                    continue
                if answer == 2:  # NLMSG_ERROR; 0 is the acknowledgement
                    code = -struct.unpack_from("=i", content)[0]
                    if code:
                        raise OSError(code, os.strerror(code), what)
                    return found
                if answer == 3:  # NLMSG_DONE
                    return found
                found.append((answer, content))

    def veth(
        self, name: str, mac: bytes, *, group: int, peer: str, peer_mac: bytes, peer_netns: int, flags: int
    ) -> None:
        """A veth pair: ``name`` here, ``peer`` in the namespace behind a descriptor; both ends get ``flags``.

        The group is set at birth: a link that is still in group 0 is matched by no rule of ours.
        """
        head = struct.pack("=BxHiII", 0, 0, 0, flags, flags)
        other = head + _attribute(_IFLA_IFNAME, _name(peer)) + _attribute(_IFLA_ADDRESS, peer_mac)
        other += _attribute(_IFLA_NET_NS_FD, struct.pack("=i", peer_netns))
        info = _attribute(_IFLA_INFO_KIND, b"veth") + _attribute(_IFLA_INFO_DATA, _attribute(_VETH_INFO_PEER, other))
        body = head + _attribute(_IFLA_IFNAME, _name(name)) + _attribute(_IFLA_ADDRESS, mac)
        body += _attribute(_IFLA_GROUP, struct.pack("=I", group)) + _attribute(_IFLA_LINKINFO, info)
        self._request(_NEWLINK, _ACK | _CREATE | _EXCL, body, f"link {name}")

    def up(self, index: int) -> None:
        """Brings a link up, without ARP where it was made so."""
        self._request(_NEWLINK, _ACK, struct.pack("=BxHiII", 0, 0, index, IFF_UP, IFF_UP), f"link {index} up")

    def remove_link(self, name: str) -> bool:
        """Deletes a link by name; False when there is none."""
        body = struct.pack("=BxHiII", 0, 0, 0, 0, 0) + _attribute(_IFLA_IFNAME, _name(name))
        try:
            self._request(_DELLINK, _ACK, body, f"link {name}")
        except OSError as error:
            if error.errno == errno.ENODEV:
                return False
            raise
        return True

    def links(self) -> dict[str, tuple[int, int]]:
        """Every link's index and flags by name."""
        found = {}
        for _, content in self._request(_GETLINK, _DUMP, struct.pack("=BxHiII", 0, 0, 0, 0, 0), "links"):
            index, flags = struct.unpack_from("=4xiI", content)
            for kind, data in attributes(content[16:]):
                if kind == _IFLA_IFNAME:
                    found[data.rstrip(b"\0").decode("ascii", "replace")] = (index, flags)
        return found

    def index(self, name: str) -> int:
        """The index of a link; OSError ENODEV."""
        body = struct.pack("=BxHiII", 0, 0, 0, 0, 0) + _attribute(_IFLA_IFNAME, _name(name))
        answer = self._request(_GETLINK, _ACK, body, f"link {name}")
        return int(struct.unpack_from("=4xi", answer[0][1])[0])

    def peer(self, name: str) -> tuple[int, int]:
        """The other end of a veth link: its index, and the number that its namespace has here, -1 for this one."""
        body = struct.pack("=BxHiII", 0, 0, 0, 0, 0) + _attribute(_IFLA_IFNAME, _name(name))
        answer = self._request(_GETLINK, _ACK, body, f"link {name}")
        values = dict(attributes(answer[0][1][16:]))
        index = struct.unpack("=i", values[_IFLA_LINK])[0] if _IFLA_LINK in values else 0
        return index, struct.unpack("=i", values[_IFLA_LINK_NETNSID])[0] if _IFLA_LINK_NETNSID in values else -1

    def number_of(self, namespace: int) -> int:
        """The number that the network namespace behind a descriptor has in this one, -1 for none."""
        body = bytes(4) + _attribute(_NETNSA_FD, struct.pack("=i", namespace))
        answer = self._request(_GETNSID, _ACK, body, "a namespace's number")
        return int(struct.unpack("=i", dict(attributes(answer[0][1][4:]))[_NETNSA_NSID])[0])

    def address(self, index: int, address: IPv4Interface, *, peer: IPv4Address | None = None) -> None:
        """Gives a link an address. No route comes with it: routes are ours to make."""
        body = struct.pack("=BBBBi", socket.AF_INET, address.network.prefixlen if peer is None else 32, 0, 0, index)
        body += _attribute(_IFA_LOCAL, address.ip.packed)
        body += _attribute(_IFA_ADDRESS, (peer or address.ip).packed)
        body += _attribute(_IFA_FLAGS, struct.pack("=I", _NOPREFIXROUTE))
        self._request(_NEWADDR, _ACK | _CREATE | _EXCL, body, f"address {address}")

    def addresses(self) -> list[tuple[int, str]]:
        """Every IPv4 address here, with the index of its link."""
        found = []
        for _, content in self._request(
            _GETADDR, _DUMP, struct.pack("=BBBBi", socket.AF_INET, 0, 0, 0, 0), "addresses"
        ):
            (index,) = struct.unpack_from("=4xi", content)
            local = dict(attributes(content[8:])).get(_IFA_LOCAL)
            if local is not None:
                found.append((index, socket.inet_ntoa(local)))
        return found

    def route(
        self,
        destination: str,
        *,
        table: int = MAIN,
        device: int = 0,
        via: IPv4Address | None = None,
        source: IPv4Address | None = None,
        metric: int = 0,
        remove: bool = False,
    ) -> None:
        """Adds or removes an IPv4 route; without a device, one that answers "unreachable"."""
        address, _, length = destination.partition("/")
        scope = _SCOPE_LINK if device and via is None else _SCOPE_UNIVERSE
        kind = _UNICAST if device else _UNREACHABLE
        # rtm_table has 8 bits; RTA_TABLE has them all.
        body = struct.pack(
            "=BBBBBBBBI", socket.AF_INET, int(length), 0, 0, min(table, 255) & 0xFF, _PROTO_STATIC, scope, kind, 0
        )
        body += _attribute(_RTA_DST, socket.inet_aton(address)) + _attribute(_RTA_TABLE, struct.pack("=I", table))
        if device:
            body += _attribute(_RTA_OIF, struct.pack("=i", device))
        if via is not None:
            body += _attribute(_RTA_GATEWAY, via.packed)
        if metric:
            body += _attribute(_RTA_PRIORITY, struct.pack("=I", metric))
        if source is not None:
            body += _attribute(_RTA_PREFSRC, source.packed)
        if remove:
            self._forget(_DELROUTE, body, f"route {destination}")
        else:
            self._request(_NEWROUTE, _ACK | _CREATE | _EXCL, body, f"route {destination}")

    def routes(self) -> list[Route]:
        """Every IPv4 route in every table."""
        found = []
        for _, content in self._request(
            _GETROUTE, _DUMP, struct.pack("=BBBBBBBBI", 2, 0, 0, 0, 0, 0, 0, 0, 0), "routes"
        ):
            length = content[1]
            values = dict(attributes(content[12:]))
            table = struct.unpack("=I", values[_RTA_TABLE])[0] if _RTA_TABLE in values else content[4]
            device = struct.unpack("=i", values[_RTA_OIF])[0] if _RTA_OIF in values else 0
            address = socket.inet_ntoa(values.get(_RTA_DST, bytes(4)))
            metric = struct.unpack("=I", values[_RTA_PRIORITY])[0] if _RTA_PRIORITY in values else 0
            found.append(Route(f"{address}/{length}", table, device, metric))
        return found

    def neighbour(self, index: int, address: IPv4Address, mac: bytes) -> None:
        """A permanent neighbour: nobody has to ask for it, and nobody can answer in its place."""
        body = struct.pack("=BxxxiHBB", socket.AF_INET, index, _NUD_PERMANENT, 0, 0)
        body += _attribute(_NDA_DST, address.packed) + _attribute(_NDA_LLADDR, mac)
        self._request(_NEWNEIGH, _ACK | _CREATE, body, f"neighbour {address}")

    def rule(self, rule: Rule, *, remove: bool = False) -> None:
        """Adds or removes an IPv4 policy routing rule; what is (or is not) there already is left as it is."""
        destination, _, length = rule.to.partition("/")
        body = struct.pack(
            "=BBBBBBBBI", socket.AF_INET, int(length or 0), 0, 0, min(rule.table, 255) & 0xFF, 0, 0, 1, 0
        )
        body += _attribute(_FRA_PRIORITY, struct.pack("=I", rule.priority))
        body += _attribute(_FRA_TABLE, struct.pack("=I", rule.table))
        if rule.to:
            body += _attribute(_FRA_DST, socket.inet_aton(destination))
        if rule.mark:
            body += _attribute(_FRA_FWMARK, struct.pack("=I", rule.mark))
            body += _attribute(_FRA_FWMASK, struct.pack("=I", 0xFF))
        if rule.iif:
            body += _attribute(_FRA_IIFNAME, _name(rule.iif))
        if remove:
            self._forget(_DELRULE, body, f"rule {rule.priority}")
        elif rule not in self.rules():
            self._request(_NEWRULE, _ACK | _CREATE | _EXCL, body, f"rule {rule.priority}")

    def rules(self) -> list[Rule]:
        """Every IPv4 policy routing rule."""
        found = []
        for _, content in self._request(_GETRULE, _DUMP, struct.pack("=BBBBBBBBI", 2, 0, 0, 0, 0, 0, 0, 0, 0), "rules"):
            values = dict(attributes(content[12:]))

            def number(kind: int, values: dict[int, bytes] = values) -> int:
                return int(struct.unpack("=I", values[kind])[0]) if kind in values else 0

            to = f"{socket.inet_ntoa(values[_FRA_DST])}/{content[1]}" if _FRA_DST in values else ""
            iif = values.get(_FRA_IIFNAME, b"").rstrip(b"\0").decode("ascii", "replace")
            table = number(_FRA_TABLE) or content[4]
            found.append(Rule(number(_FRA_PRIORITY), table, number(_FRA_FWMARK), iif, to))
        return found

    def _forget(self, kind: int, body: bytes, what: str) -> None:
        try:
            self._request(kind, _ACK, body, what)
        except OSError as error:
            if error.errno not in (errno.ESRCH, errno.ENOENT, errno.ENODEV):
                raise
