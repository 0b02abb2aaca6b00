"""DNS messages, as much of them as the allow-list needs (RFC 1035): the question, the addresses, and refusals. Pure.

Queries come from hostile apps and answers from hostile servers: every offset is checked, names are bounded, and
anything odd is a ValueError.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

A, AAAA, _IN = 1, 28, 1
NOERROR, SERVFAIL, REFUSED = 0, 2, 5
_MAX_LABELS = 128


class Question(NamedTuple):
    """What is asked. ``name``: lower case, without the last dot. ``end``: where the question ends in the message."""

    id: int
    name: str
    type: int
    end: int


class Address(NamedTuple):
    """One IPv4 address of an answer, and for how many seconds it may be used."""

    address: str
    ttl: int


def question(message: bytes) -> Question:
    """The one question of a query. ValueError for anything but a plain query of class IN."""
    if len(message) < 17:
        raise ValueError("too short")
    ident, flags, count, *others = struct.unpack_from(">6H", message)
    # QR, opcode: only standard queries; one EDNS record may follow.
    if flags & 0xF800 or count != 1 or others[0] or others[1] or others[2] > 1:
        raise ValueError("not a plain query")
    name, position = _name(message, 12)
    kind, family = struct.unpack_from(">2H", _piece(message, position, 4))
    if family != _IN:
        raise ValueError("not of class IN")
    return Question(ident, name, kind, position + 4)


def addresses(message: bytes) -> list[Address]:
    """Every IPv4 address in the answer section, whatever the alias that led to it."""
    if len(message) < 12:
        raise ValueError("too short")
    _, _, questions, answers, _, _ = struct.unpack_from(">6H", message)
    position, found = 12, []
    for _ in range(questions):
        _, position = _name(message, position)
        position += 4
    for _ in range(min(answers, 256)):
        _, position = _name(message, position)
        kind, family, ttl, length = struct.unpack(">HHIH", _piece(message, position, 10))
        data = _piece(message, position + 10, length)
        position += 10 + length
        if (kind, family, length) == (A, _IN, 4):
            # RFC 2181: a TTL with the top bit set is zero.
            found.append(Address(".".join(str(byte) for byte in data), 0 if ttl & 0x80000000 else ttl))
    return found


def reply(query: bytes, asked: Question, code: int, *, answers: tuple[Address, ...] = ()) -> bytes:
    """An answer of our own: a code, and perhaps addresses."""
    recursion = query[2] & 1
    head = struct.pack(">6H", asked.id, 0x8080 | recursion << 8 | code, 1, len(answers), 0, 0)
    body = b"".join(
        struct.pack(">HHHIH", 0xC00C, A, _IN, item.ttl, 4) + bytes(int(part) for part in item.address.split("."))
        for item in answers
    )
    return head + query[12 : asked.end] + body


def _piece(message: bytes, start: int, length: int) -> bytes:
    if start + length > len(message):
        raise ValueError("cut short")
    return message[start : start + length]


def _name(message: bytes, position: int) -> tuple[str, int]:
    """A name and where it ends. Pointers may only lead backwards, so none can loop."""
    labels: list[str] = []
    end, limit = 0, position
    while True:
        length = _piece(message, position, 1)[0]
        if length & 0xC0 == 0xC0:
            target = struct.unpack(">H", _piece(message, position, 2))[0] & 0x3FFF
            end = end or position + 2
            if target >= limit:
                raise ValueError("a pointer that does not lead back")
            position = limit = target
            continue
        if length & 0xC0:
            raise ValueError("an unknown kind of label")
        position += 1
        if length == 0:
            break
        label = _piece(message, position, length)
        # A dot inside a label would read like two labels.
        if b"." in label or not label.isascii():
            raise ValueError("a label that is no text")
        labels.append(label.decode("ascii").lower())
        position += length
        if len(labels) > _MAX_LABELS or len(".".join(labels)) > 253:
            raise ValueError("too long")
    return ".".join(labels), end or position
