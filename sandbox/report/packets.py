"""Packets from a twin's own address: what is denied, with canaries at the other ends and the kernel's counters."""

from __future__ import annotations

import socket
import struct
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from ipaddress import IPv4Address
from typing import Any

from sandbox.config import Config
from sandbox.errors import HostError
from sandbox.firewall import admit, denied, guard, router, ruleset
from sandbox.firewall.layout import Layout, Place
from sandbox.host.nft import Nft
from sandbox.policy.egress import METADATA, RESOLVER, Egress, Mode
from sandbox.report import twin as twins
from sandbox.report.stage import HOST, PUBLIC, WAIT_S, Attempt, Stage, inside_network, send
from sandbox.report.twin import Twin

Json = dict[str, Any]
_HOST_PORT = 5432
_INNER = "private shared link-local reserved dyno"


def network(twin: Twin, stage: Stage, config: Config) -> Json:
    """Attempts at everything that is denied, with canaries at the other ends and the kernel's counters."""
    place = twin.record.place
    if place is None:
        return {}
    twin.prober.ask("serve", serve={"ports": [twins.PORT, twins.OTHER_PORT]})
    other = stage.neighbour(config)
    try:
        link_address = str(Layout(config).host_address)
        for address in (HOST, link_address):
            with suppress(OSError):  # a second session on the same stage finds them listening
                stage.canary(address, _HOST_PORT)
        found = _denied(twin, stage, config, other, link_address)
        found |= {"NET-17": _inbound(place, stage), "NET-22": _burst(twin, stage, config)}
        for row, more in _special(twin, stage, config, other).items():
            found[row] = [*found.get(row, []), *more]
        return found
    finally:
        stage.leave(config, other)


def _denied(twin: Twin, stage: Stage, config: Config, other: Place, link_address: str) -> Json:
    gateway = str(twin.record.place.gateway) if twin.record.place else ""
    decoys = stage.decoys()
    rows: dict[str, list[Attempt]] = {
        "NET-02": [
            Attempt(p, a, _HOST_PORT, "host dyno") for p in ("tcp", "udp") for a in (HOST, link_address, gateway)
        ],
        "NET-03": [Attempt(p, str(other.address), 80, "dyno") for p in ("tcp", "udp")],
        "NET-04": [Attempt(p, a, 80, "metadata") for p in ("tcp", "udp") for a in METADATA],
        "NET-05": [Attempt(p, a, 80, _INNER) for p in ("tcp", "udp") for a in decoys],
        "NET-06": [Attempt("udp", "224.0.0.251", 5353, "multicast")],
        "NET-19": [Attempt("tcp", RESOLVER, 853, "host"), Attempt("udp", RESOLVER, 5353, "host")],
        "NET-21": [Attempt("tcp", PUBLIC, 25, "smtp")],
    }
    mode = twin.wanted.policy.egress.mode
    if mode is not Mode.PUBLIC:
        rule = "egress-none" if mode is Mode.NONE else "not-listed"
        rows["NET-30"] = [Attempt(p, PUBLIC, 80, rule) for p in ("tcp", "udp")]
    before, seen = _details(config), Counter(stage.seen)
    answered = send(twin.netns, [attempt for attempts in rows.values() for attempt in attempts])
    after = _details(config)
    found: Json = {}
    for row, attempts in rows.items():
        found[row] = []
        for attempt in attempts:
            key = (attempt.protocol, attempt.address, attempt.port)
            rules = {k[3]: after[k] - before[k] for k in after if k[:3] == key and after[k] > before[k]}
            arrived = stage.seen[attempt.what] - seen[attempt.what] + (attempt.what in answered)
            found[row].append(
                {
                    "what": attempt.what,
                    "seen": arrived,
                    # By the rule that is meant: another one would stop it today, and be gone tomorrow.
                    "denied": sum(count for rule, count in rules.items() if rule in attempt.rule.split()),
                    "rule": next((rule for rule in rules if rule in attempt.rule.split()), attempt.rule),
                }
            )
    if mode is Mode.PUBLIC:
        found["positive"] = _positive(twin)
    return found


def _positive(twin: Twin) -> list[Json]:
    """What must work: a wall that denies everything would pass every other check."""
    said = twin.prober.ask("connect", connect={"targets": [["tcp", PUBLIC, 80], ["udp", PUBLIC, 80]], "seconds": 2.0})
    return [{"what": what, "answered": outcome == "answered"} for what, outcome in said["connect"]]


def _details(config: Config) -> Counter[tuple[str, str, int, str]]:
    """Packets denied so far, by protocol, address, port and rule."""
    counts: Counter[tuple[str, str, int, str]] = Counter()
    for item in denied.read(config)[0]:
        if item.direction == "out":
            counts[item.protocol, item.address, item.port or 0, item.rule] += item.packets
    return counts


def _totals(config: Config) -> Counter[str]:
    counts: Counter[str] = Counter()
    for item in denied.read(config)[1]:
        counts[item.rule] += item.packets
    return counts


def _inbound(place: Place, stage: Stage) -> list[Json]:
    """Who can connect to the twin: this host to $PORT, nobody else, nobody to another port."""
    address = str(place.address)
    tries = (
        ("this host to $PORT", "/proc/self/ns/net", twins.PORT, True),
        ("this host to another port", "/proc/self/ns/net", twins.OTHER_PORT, False),
        ("another app to $PORT", f"/proc/self/fd/{stage.neighbour_fd}", twins.PORT, False),
        ("the outside to $PORT", stage.path, twins.PORT, False),
    )

    def knock(attempt: tuple[str, str, int, bool]) -> Json:
        what, where, port, wanted = attempt
        answered = bool(send(where, [Attempt("tcp", address, port, "")], wait_s=2.0 if wanted else WAIT_S))
        words = {True: "answered", False: "nothing"}
        return {"what": what, "promised": words[wanted], "observed": words[answered], "holds": answered == wanted}

    # Nothing is waited for three times: at once.
    with ThreadPoolExecutor(len(tries)) as pool:
        return list(pool.map(knock, tries))


def _burst(twin: Twin, stage: Stage, config: Config) -> Json:
    """New flows at once, more than the policy allows in a second and as many as it lets through in one burst."""
    rate = twin.wanted.policy.traffic.flows_per_s
    sent = rate * 2 + 100
    if twin.wanted.policy.egress.mode is not Mode.PUBLIC:
        rate = 0
    before, seen = _totals(config), stage.seen[f"udp {PUBLIC}:80"]

    def action(_: Callable[[bytes], None]) -> None:
        links = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(200)]
        for index in range(sent):
            if index and index % 200 == 0:
                for link in links:
                    link.close()
                links = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(200)]
            with suppress(OSError):
                links[index % 200].sendto(b"x", (PUBLIC, 80))

    begin = time.monotonic()
    inside_network(twin.netns, action)
    seconds = time.monotonic() - begin
    time.sleep(0.1)
    after = _totals(config)
    rule = "new-rate" if rate else next(iter(after - before), "egress-none")
    return {
        "sent": sent,
        "arrived": stage.seen[f"udp {PUBLIC}:80"] - seen,
        "most": round(rate + rate * (seconds + 0.3)),
        "denied": after[rule] - before[rule],
    }


def _special(twin: Twin, stage: Stage, config: Config, other: Place) -> Json:
    """What needs crafted packets: false senders, IPv6, fragments, ARP. Sent as root from the twin's own interface."""
    place = twin.record.place
    if place is None:
        return {}
    found: Json = {}
    mac = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")
    spoofed = _ipv4(str(other.address), PUBLIC, 17, _udp(80))
    whole = struct.pack(">HHHH", 40000, 80, 16, 0) + b"fragment"
    fragments = [
        _ipv4(str(place.address), "10.0.0.9", 17, part, flags=flags)
        for part, flags in ((whole[:8], 0x2000), (whole[8:], 0x0001))  # more to come; 8 bytes on
    ]
    six = (
        struct.pack(">IHBB", 6 << 28, 8, 17, 64)
        + bytes.fromhex("fd" + "00" * 15)
        + bytes.fromhex("26062800022000010000000000000001")
        + _udp(80)
    )
    false = bytes.fromhex("02000000dead")
    arp = struct.pack(">HHBBH", 1, 0x800, 6, 4, 2) + false + place.address.packed + mac[0] + place.gateway.packed
    everybody = [_ipv4(str(place.address), "255.255.255.255", 17, _udp(5353))]
    plans = (
        ("NET-06", "a broadcast packet", "broadcast", 0x0800, everybody, ""),
        ("NET-08", "a packet with a neighbour's address", "spoofed", 0x0800, [spoofed], f"udp {PUBLIC}:80"),
        ("NET-07", "an IPv6 packet", "ipv6", 0x86DD, [six], ""),
        ("NET-26", "a packet to 10.0.0.9 in two fragments", "private", 0x0800, fragments, "udp 10.0.0.9:80"),
    )
    for row, what, rule, kind, packets, canary in plans:
        before, seen = _totals(config) + _six(twin, config), stage.seen[canary]
        for packet in packets:
            _frame(twin, (b"\xff" * 6, mac[1]) if packets is everybody else mac, kind, packet)
        time.sleep(0.03)
        after = _totals(config) + _six(twin, config)
        arrived, grown = stage.seen[canary] - seen, after[rule] - before[rule]
        found.setdefault(row, []).append({"what": what, "seen": arrived, "denied": grown, "rule": rule})
    found["NET-10"] = [_arp(twin, config, mac, arp)]
    return found


def _six(twin: Twin, config: Config) -> Counter[str]:
    """IPv6 packets that the router's kernel discarded on the twin's link: where IPv6 is off, no rule sees them."""
    path = f"/proc/thread-self/net/dev_snmp6/{twin.link}"
    with router.inside(Layout(config)), suppress(FileNotFoundError), open(path, encoding="ascii") as file:
        table = dict(line.split() for line in file)
        return Counter(ipv6=int(table.get("Ip6InDiscards", 0)))
    return Counter()


def _frame(twin: Twin, mac: tuple[bytes, bytes], kind: int, body: bytes) -> None:
    def action(_: Callable[[bytes], None]) -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as link:
            link.bind(("eth0", 0))
            with suppress(OSError):
                link.send(mac[0] + mac[1] + struct.pack(">H", kind) + body)

    inside_network(twin.netns, action)


def _arp(twin: Twin, config: Config, mac: tuple[bytes, bytes], body: bytes) -> Json:
    """A false answer to nobody's question: the router keeps the neighbour that it was given."""
    address = str(twin.record.place.address) if twin.record.place else ""
    _frame(twin, mac, 0x0806, body)
    time.sleep(0.03)
    with router.inside(Layout(config)), open("/proc/thread-self/net/arp", encoding="ascii") as file:
        lines = [line.split() for line in file.read().splitlines()[1:]]
    # The flags of arp(7): 0x6 is complete and permanent.
    known = [f"{fields[3]} {fields[2]}" for fields in lines if fields[0] == address]
    wanted = f"{':'.join(f'{byte:02x}' for byte in mac[1])} 0x6"
    return {
        "what": "the router's neighbour after a false ARP answer",
        "promised": wanted,
        "observed": known[0] if known else "none",
        "holds": known == [wanted],
    }


def _ipv4(source: str, target: str, protocol: int, body: bytes, *, flags: int = 0) -> bytes:
    head = struct.pack(
        ">BBHHHBBH4s4s",
        0x45,
        0,
        20 + len(body),
        7,
        flags,
        64,
        protocol,
        0,
        IPv4Address(source).packed,
        IPv4Address(target).packed,
    )
    total = sum(struct.unpack(f">{len(head) // 2}H", head))
    total = (total & 0xFFFF) + (total >> 16)
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    return head[:10] + struct.pack(">H", checksum) + head[12:] + body


def _udp(port: int) -> bytes:
    return struct.pack(">HHHH", 40000, port, 8, 0)


def names(twin: Twin, meanwhile: Callable[[], None]) -> Json:
    """What the resolver says of a public name, of one with a private address, and of one that changes.

    ``meanwhile`` is done while the changing name's first answer grows old.
    """
    if not twin.wanted.policy.egress.resolves:
        said = twin.prober.ask("resolve", resolve={"server": RESOLVER, "names": ["public.example"]})["resolve"]
        meanwhile()
        return {"NET-19-names": [_named("a name, without egress", "no answer", said[0][1], public=False)]}
    asked = ["public.example", "private.example", "changing.example", "changing.example"]
    first = twin.prober.ask("resolve", resolve={"server": RESOLVER, "names": asked[:3]})["resolve"]
    old = time.monotonic() + 1.1  # the answer lives for a second
    meanwhile()
    time.sleep(max(0.0, old - time.monotonic()))
    second = twin.prober.ask("resolve", resolve={"server": RESOLVER, "names": asked[3:]})["resolve"]
    policed = twin.wanted.policy.egress.policed
    return {
        "NET-19-names": [
            _named(
                "a public name", "its address" if not policed else "not on the list", first[0][1], public=not policed
            ),
            _named("a name with a metadata address", "no such address", first[1][1], public=False),
        ],
        "NET-20": [
            _named(
                "a name, first public",
                "its address" if not policed else "not on the list",
                first[2][1],
                public=not policed,
            ),
            _named("then changed to a metadata address", "no such address", second[0][1], public=False),
        ],
    }


def _named(what: str, promised: str, said: str, *, public: bool) -> Json:
    holds = said == PUBLIC if public else not said.startswith(("169.254.", "93."))
    return {"what": what, "promised": promised, "observed": said, "holds": holds}


def changed(twin: Twin, stage: Stage, config: Config) -> Json:
    """An open flow after the egress of its dyno became ``none``."""
    place = twin.record.place
    if place is None or twin.wanted.policy.egress.mode is not Mode.PUBLIC:
        return {}
    name = f"flow tcp {PUBLIC}:80"
    twin.prober.ask("keep", keep={"target": [PUBLIC, 80]})
    twin.prober.ask("speak")
    time.sleep(0.05)
    before = stage.seen[name]
    record = router.read_record(Layout(config).record(place.address))
    if record is None:
        raise HostError("the twin's record is gone.")
    admit.change(config, record, Egress(Mode.NONE))
    twin.prober.ask("speak")
    time.sleep(WAIT_S)
    seen = stage.seen[name] - before
    record = router.read_record(Layout(config).record(place.address))
    if record is not None:
        admit.change(config, record, twin.wanted.policy.egress)
    return {"before": before, "seen": seen}


def vanished(twin: Twin, stage: Stage, config: Config) -> list[Json]:
    """With the router's rules deleted and nobody to put them back: what arrives from the twin."""
    guard.stop(Layout(config))
    with router.inside(Layout(config)):
        nft = Nft()
    nft.run(f"delete table {ruleset.TABLE}")
    nft.close()
    targets = [Attempt("tcp", a, 80, "") for a in (PUBLIC, "169.254.169.254", "10.0.0.9")]
    seen = Counter(stage.seen)
    answered = send(twin.netns, targets)
    return [
        {
            "what": f"{target.what} without the rules",
            "promised": "nothing",
            "observed": "ARRIVED"
            if target.what in answered or stage.seen[target.what] > seen[target.what]
            else "nothing",
            "holds": target.what not in answered and stage.seen[target.what] == seen[target.what],
        }
        for target in targets
    ]


def logged(twin: Twin, config: Config) -> str:
    """Whether a denied packet is counted under the dyno's own name within a second."""
    before = _totals(config)
    send(twin.netns, [Attempt("udp", "10.0.0.9", 4711, "private")], wait_s=0.0)
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        if _totals(config)["private"] > before["private"]:
            return "counted"
        time.sleep(0.02)
    return "not counted"
