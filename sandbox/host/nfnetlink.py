"""What nftables' library does not offer: cutting flows, and hearing of denied packets and of changed rules."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

from sandbox.host.netlink import attributes

# linux/netlink.h, linux/netfilter/nfnetlink*.h
_REQUEST, _ACK = 1, 4
_NETFILTER = 12
_GROUP_NFTABLES = 7
_CTNETLINK, _NFTABLES, _ULOG = 1, 10, 4
_CT_DELETE, _CTA_MARK, _CTA_MARK_MASK = 2, 8, 21
_ULOG_PACKET, _ULOG_CONFIG = 0, 1
_CFG_CMD, _CFG_MODE, _CFG_THRESHOLD, _CMD_BIND, _COPY_PACKET = 1, 2, 5, 1, 2
_NFULA_MARK, _NFULA_IFINDEX_IN, _NFULA_PAYLOAD, _ELEMENTS_SET = 2, 4, 9, 2
# NFT_MSG_NEWSETELEM, NFT_MSG_DELSETELEM; NFT_MSG_NEWGEN comes last and says who.
_ELEMENTS = (12, 14)
_NEWGEN, _GEN_PID, _GEN_NAME = 15, 2, 3


class LoggedPacket(NamedTuple):
    """A denied packet: the router's link it came in by, its mark, and its first bytes."""

    link: int
    mark: int
    payload: bytes


class Change(NamedTuple):
    """A committed change of rules. ``rules``: more than elements of sets; ``pid``, ``program``: who, 0 if not said."""

    rules: bool
    pid: int = 0
    program: str = ""


def _attribute(kind: int, data: bytes) -> bytes:
    length = 4 + len(data)
    return struct.pack("=HH", length, kind) + data + bytes(-length % 4)


def _message(subsystem: int, kind: int, body: bytes, *, group: int = 0, family: int = 0) -> bytes:
    content = struct.pack(">BBH", family, 0, group) + body
    return struct.pack("=IHHII", 16 + len(content), subsystem << 8 | kind, _REQUEST | _ACK, 1, 0) + content


def _open(groups: int = 0) -> socket.socket:
    link = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETFILTER)
    link.bind((0, groups))
    return link


def _acknowledged(link: socket.socket, what: str) -> None:
    data = link.recv(65536)
    code = -struct.unpack_from("=i", data, 16)[0]
    if code:
        raise OSError(code, os.strerror(code), what)


def cut_flows(mark: int) -> None:
    """Forgets every tracked flow with that mark, in the caller's network namespace: its next packet is a new flow."""
    with _open() as link:
        body = _attribute(_CTA_MARK, struct.pack(">I", mark)) + _attribute(_CTA_MARK_MASK, b"\xff\xff\xff\xff")
        link.send(_message(_CTNETLINK, _CT_DELETE, body))
        _acknowledged(link, f"flows with mark {mark}")


def open_log(group: int) -> socket.socket:
    """A socket that gets the packets of one log group of the caller's network namespace."""
    link = _open()
    commands = (
        _attribute(_CFG_CMD, struct.pack("=Bxxx", _CMD_BIND)),
        _attribute(_CFG_MODE, struct.pack(">IBx", 64, _COPY_PACKET)),
        # One at a time: by default the kernel collects them for a second.
        _attribute(_CFG_THRESHOLD, struct.pack(">I", 1)),
    )
    for command in commands:
        link.send(_message(_ULOG, _ULOG_CONFIG, command, group=group))
        _acknowledged(link, f"log group {group}")
    link.setblocking(False)
    return link


def open_events() -> socket.socket:
    """A socket that hears of every change of rules in the caller's network namespace."""
    link = _open(1 << (_GROUP_NFTABLES - 1))
    link.setblocking(False)
    return link


def _messages(data: bytes) -> Iterator[tuple[int, dict[int, bytes]]]:
    while len(data) >= 20:
        length, kind = struct.unpack_from("=IH", data)
        if length < 20:
            break
        yield kind, dict(attributes(data[20:length]))
        data = data[(length + 3) & ~3 :]


def _number(values: dict[int, bytes], kind: int) -> int:
    return int(struct.unpack(">I", values.get(kind, bytes(4))[:4])[0])


def parse_log(data: bytes) -> list[LoggedPacket]:
    """The packets in what the log's socket received."""
    return [
        LoggedPacket(_number(v, _NFULA_IFINDEX_IN), _number(v, _NFULA_MARK), v.get(_NFULA_PAYLOAD, b""))
        for kind, v in _messages(data)
        if kind == _ULOG << 8 | _ULOG_PACKET
    ]


def parse_change(data: bytes) -> Change:
    """What a datagram of events says in sum. Elements alone are daily business, but for those that deny."""
    change = Change(rules=False)
    for kind, values in _messages(data):
        if kind >> 8 != _NFTABLES:
            continue
        if kind & 0xFF == _NEWGEN:
            program = values.get(_GEN_NAME, b"").rstrip(b"\0").decode("utf-8", "replace")
            change = change._replace(pid=_number(values, _GEN_PID), program=program)
        elif kind & 0xFF not in _ELEMENTS or values.get(_ELEMENTS_SET, b"").startswith(b"deny4"):
            change = change._replace(rules=True)
    return change
