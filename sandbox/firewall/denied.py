"""What the kernel counted: denied packets by dyno, protocol and destination. Reads only."""

from __future__ import annotations

from typing import Any, NamedTuple

from sandbox.config import Config
from sandbox.firewall import router, ruleset
from sandbox.firewall.guard import PROTOCOLS, rule_of
from sandbox.firewall.layout import Layout
from sandbox.host.nft import Nft, elements

_NUMBERS = {name: number for number, name in PROTOCOLS.items()}


class Denial(NamedTuple):
    """Packets of one dyno to one destination. ``direction``: ``out``, or ``in`` for what others sent to it."""

    dyno: str
    id: str
    direction: str
    protocol: str
    address: str
    port: int | None
    rule: str
    packets: int


class Total(NamedTuple):
    """All packets of one dyno that one rule denied; a dyno cannot make this table grow, so nothing is missing here."""

    dyno: str
    id: str
    rule: str
    packets: int


def read(config: Config) -> tuple[list[Denial], list[Total]]:
    """Every denial of the last 15 minutes in detail, and the totals since each dyno was admitted."""
    layout = Layout(config)
    if not router.standing(layout):
        return [], []
    known = {record["link"]: record for record in router.records(layout)}
    with router.inside(layout):
        nft = Nft()
    denials, totals = [], []
    for name, has_port in (("denied4", True), ("deniedx", False), ("denied6", False), ("refused4", True)):
        for key, packets in _counters(nft, name):
            record = known.get(key[0], {})
            inbound = name == "refused4"
            denials.append(
                Denial(
                    dyno=str(record.get("name", "")),
                    id=str(record.get("id", key[0])),
                    direction="in" if inbound else "out",
                    protocol=_protocol(key[2]),
                    address=str(key[1]),
                    port=int(key[3]) if has_port else None,
                    rule="inbound" if inbound else rule_of(int(key[-1])),
                    packets=packets,
                )
            )
    for key, packets in _counters(nft, "total"):
        record = known.get(key[0], {})
        who = str(record.get("name", "")), str(record.get("id", key[0]))
        totals.append(Total(*who, rule_of(int(key[1])), packets))
    nft.close()
    return sorted(denials, key=lambda item: (item.dyno, item.id, -item.packets)), sorted(totals)


def _protocol(value: object) -> str:
    """Nftables prints the protocols that it knows by name and the others as numbers."""
    text = str(value)
    return PROTOCOLS.get(int(text), text) if text.isdigit() else text


def _counters(nft: Nft, name: str) -> list[tuple[list[Any], int]]:
    """The keys and packet counts of a set of concatenated keys."""
    found = []
    for item in nft.listing(f"set {ruleset.TABLE} {name}", state=True):
        for key, body in elements(item):
            found.append((key, int(body.get("counter", {}).get("packets", 0))))
    return found
