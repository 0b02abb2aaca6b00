"""What this app can reach, and who can reach it."""

from __future__ import annotations

from collections.abc import Iterator

from sandbox.policy.clauses import Clause
from sandbox.policy.egress import METADATA, Mode, Reason
from sandbox.policy.seccomp import NETLINK
from sandbox.report.facts import Facts
from sandbox.report.model import CRITICAL, MINOR, MODERATE, SERIOUS, SEVERE, Area, Fact, Row, Tier
from sandbox.report.rows.common import absent, kernel, measured, network
from sandbox.units import show

_FIX = "the next start repairs the wall; `sandbox firewall show` says what is missing"
_NONE = "none for web apps"
_RANGES = frozenset((Reason.PRIVATE, Reason.SHARED, Reason.LINK_LOCAL, Reason.RESERVED))
_FAMILIES = tuple(n for n in range(46) if n not in (1, 2, 10, 16))
ROUTED = "its packets pass the router"
_LOOKUP = "meta mark set ip daddr map @deny4 goto deny"


def _rule(facts: Facts, what: str, text: str) -> Fact:
    there = text in facts.wall.rules
    return kernel(f"the rule against {what}", "in the packet path", "there" if there else "missing", holds=there)


def _interfaces(facts: Facts) -> Iterator[Fact]:
    for promised, observed in facts.wall.differences:
        yield kernel("its network", promised, observed, holds=False)
    if not facts.wall.differences:
        place = facts.record.place
        yield kernel(
            "its network",
            "lo and eth0, one address, one way out",
            f"lo, eth0 {place.address if place else ''}, one way out",
            holds=True,
        )


def _host(facts: Facts) -> Iterator[Fact]:
    hosts = facts.wall.hosts
    yield kernel(
        "addresses of the host that are denied",
        "every one",
        ", ".join(sorted(hosts)) or "none",
        holds=bool(hosts) and "host addresses" not in facts.wall.faults,
    )
    yield from network(facts, "NET-02")
    yield from _own_wall(facts, "this host", "ip daddr @hosts4 meta mark set 0x00000001 goto deny")


def _own_wall(facts: Facts, what: str, text: str) -> Iterator[Fact]:
    yield from _itself(facts)
    yield _rule(facts, what, text)


def _extra(facts: Facts, *sets: str) -> Iterator[Fact]:
    """What the router's sets hold for this dyno beyond what it was given: each element is a right."""
    extra = [item for item in facts.wall.extra if item.partition(" ")[0] in sets]
    yield kernel(
        f"rights in {', '.join(sets)} that it was not given", "none", "; ".join(extra[:3]) or "none", holds=not extra
    )


def _itself(facts: Facts) -> Iterator[Fact]:
    """Only of the dyno's packets: whoever is not behind its link is met by none of these rules."""
    # An element that is missing in the router takes rights away, or is a row of its own; it opens no other way.
    other = [seen for promised, seen in facts.wall.differences if not promised.startswith("known to the router")]
    walled = facts.record.place is not None and not other
    yield kernel(ROUTED, "all of them", "yes" if walled else "no", holds=walled)


def _others(facts: Facts) -> Iterator[Fact]:
    for other in facts.others:
        if other.place is not None:
            covered = facts.wall.covers(str(other.place.address))
            yield kernel(
                f"{other.name} at {other.place.address}", "denied", "denied" if covered else "open", holds=covered
            )
    covered = facts.wall.covers_all(facts.config.pool)
    yield kernel("the dynos' addresses", "denied", "denied" if covered else "open", holds=covered)
    yield from network(facts, "NET-03")
    yield from _own_wall(facts, "other apps", _LOOKUP)


def _metadata(facts: Facts) -> Iterator[Fact]:
    open_ = [address for address in METADATA if not facts.wall.covers(address)]
    yield kernel(
        "the clouds' metadata addresses", "denied", ", ".join(open_) or f"all {len(METADATA)} denied", holds=not open_
    )
    yield from _extra(facts, "permit4")
    yield from network(facts, "NET-04")
    yield from _own_wall(facts, "metadata services", _LOOKUP)


def _private(facts: Facts) -> Iterator[Fact]:
    missing = facts.wall.misses(_RANGES)
    yield kernel(
        "private, shared, link-local and reserved ranges",
        "denied",
        ", ".join(missing) or "all denied",
        holds=not missing,
    )
    yield from _extra(facts, "permit4")
    yield from network(facts, "NET-05")
    yield from _own_wall(facts, "private networks", _LOOKUP)


def _multicast(facts: Facts) -> Iterator[Fact]:
    missing = facts.wall.misses(frozenset((Reason.MULTICAST, Reason.BROADCAST)))
    yield kernel("multicast and broadcast ranges", "denied", ", ".join(missing) or "all denied", holds=not missing)
    yield from network(facts, "NET-06")
    yield from _own_wall(facts, "multicast and broadcast", "fib daddr type { local, broadcast, anycast, multicast }")


def _ipv6(facts: Facts) -> Iterator[Fact]:
    for name, promised, observed in facts.wall.sysctls:
        if name.startswith("ipv6"):
            yield kernel(f"{name} in the router", promised, observed, holds=observed in (promised, "absent"))
    yield from network(facts, "NET-07")
    yield from _own_wall(facts, "IPv6", "meta nfproto != ipv4 meta mark set 0x00000011 goto deny")


def _spoof(facts: Facts) -> Iterator[Fact]:
    there = facts.wall.members.get("source", False)
    yield kernel("its own address in the set of senders", "there", "there" if there else "missing", holds=there)
    yield from _extra(facts, "src4")
    yield from network(facts, "NET-08")
    yield from _own_wall(facts, "false senders", "iifname . ip saddr != @src4 meta mark set 0x00000010 goto deny")


def _arp(facts: Facts) -> Iterator[Fact]:
    yield from said(facts, "NET-10")
    yield from _itself(facts)


def said(facts: Facts, row: str) -> Iterator[Fact]:
    """Attempts whose outcome says by itself what it means."""
    for attempt in measured(facts, row) or ():
        yield Fact(Tier.NETWORK, attempt["what"], attempt["promised"], attempt["observed"], attempt["holds"])


def _inbound(facts: Facts) -> Iterator[Fact]:
    rule = "tcp dport @inbound4 ct state new"
    yield _rule(facts, "connections to its other ports", rule)
    if facts.record.port:
        there = facts.wall.members.get("inbound", False)
        yield kernel(
            "the way in for this host", f"port {facts.record.port} only", "set" if there else "missing", holds=there
        )
    yield from _extra(facts, "inbound4", "reply4")
    yield from said(facts, "NET-17")
    yield from _itself(facts)


def _names(facts: Facts) -> Iterator[Fact]:
    from sandbox.firewall import router
    from sandbox.firewall.layout import Layout

    alive = router.guarded(Layout(facts.config))
    who = "the guard's resolver" if alive else "nobody: names do not resolve"
    yield kernel("who answers names", "the guard's resolver", who, holds=True if alive else None, why=who)
    with open(f"/proc/{facts.pid}/root/etc/resolv.conf", encoding="utf-8", errors="replace") as file:
        asked = file.read(4096)
    good = asked == facts.spec.policy.egress.resolv_conf()
    yield kernel("/etc/resolv.conf", "as it was written", "as it was written" if good else show(asked), holds=good)
    yield from network(facts, "NET-19")
    yield from said(facts, "NET-19-names")
    yield from _itself(facts)


def _rebinding(facts: Facts) -> Iterator[Fact]:
    yield from said(facts, "NET-20")


def _switch(facts: Facts, name: str) -> Iterator[Fact]:
    if facts.record.place is None:
        return
    promised, observed = facts.wall.own_sysctls[name]
    yield kernel(f"net/{name} in its network", promised, observed, holds=observed == promised)


def _low_ports(facts: Facts) -> Iterator[Fact]:
    yield from _switch(facts, "ipv4/ip_unprivileged_port_start")


def _ping(facts: Facts) -> Iterator[Fact]:
    yield from _switch(facts, "ipv4/ping_group_range")


def _smtp(facts: Facts) -> Iterator[Fact]:
    if facts.spec.policy.egress.smtp:
        yield absent("egress of the policy", "smtp", "this app asked for port 25")
        return
    yield from _extra(facts, "smtp")
    yield from network(facts, "NET-21")
    yield from _own_wall(facts, "mail", "tcp dport 25 iifname != @smtp meta mark set 0x00000013 goto deny")


def _flood(facts: Facts) -> Iterator[Fact]:
    yield _rule(facts, "floods of new flows", "iifname @fresh meta mark set 0x00000018 goto deny")
    there = facts.wall.members.get("new flows", False)
    yield kernel("its rate of new flows", "set", "set" if there else "missing", holds=there)
    found = measured(facts, "NET-22")
    if found is not None:
        good = found["arrived"] <= found["most"] and found["denied"] > 0
        slow = found["sent"] <= found["most"] and not found["denied"]
        yield Fact(
            Tier.NETWORK,
            f"{found['sent']} new flows at once",
            f"at most {found['most']} arrive",
            f"{found['arrived']} arrived, new-rate +{found['denied']}",
            None if slow else good,
            why="they were sent too slowly to meet the limit",
        )
    yield from _itself(facts)


def _cut(facts: Facts) -> Iterator[Fact]:
    found = measured(facts, "NET-23")
    if found is not None:
        good = not found["seen"] if found["before"] else None
        yield Fact(
            Tier.NETWORK,
            "an open flow after its policy was changed to none",
            "cut",
            "ARRIVED" if found["seen"] else "cut",
            good,
            why="the flow never worked",
        )


def _helpers(facts: Facts) -> Iterator[Fact]:
    there = "ct helper" in facts.wall.rules
    yield kernel("helpers that open ports by what is said", "none", "some" if there else "none", holds=not there)
    yield from _itself(facts)


def _options(facts: Facts) -> Iterator[Fact]:
    for name, promised, observed in facts.wall.sysctls:
        if not name.startswith("ipv6"):
            yield kernel(f"{name} in the router", promised, observed, holds=observed == promised)
    yield from network(facts, "NET-26")
    yield from _itself(facts)


def _vanish(facts: Facts) -> Iterator[Fact]:
    faults = [
        fault for fault in facts.wall.faults if fault.startswith(("router routing rules", "routes", "foreign rout"))
    ]
    yield from _itself(facts)
    yield kernel("routes for unmarked packets", "none", ", ".join(faults) or "none", holds=not faults)
    yield from said(facts, "NET-28")


def _whole(facts: Facts) -> Iterator[Fact]:
    for fault in facts.wall.faults:
        yield kernel("the wall as it was made", "unchanged", f"changed: {fault}", holds=False)
    if not facts.wall.faults:
        yield kernel("the wall as it was made", "unchanged", f"sha256 {facts.wall.digest[:12]}", holds=True)
    yield from _itself(facts)


def _none_mode(facts: Facts) -> Iterator[Fact]:
    """The egress that was asked for: what is not on it does not pass."""
    mode = facts.spec.policy.egress.mode
    rule = {
        Mode.PUBLIC: "iifname @public goto rates",
        Mode.ALLOW: "iifname @allowing meta mark set 0x00000014 goto deny",
        Mode.NONE: "meta mark set 0x00000015 goto deny",
    }[mode]
    yield _rule(facts, f"what egress {mode.value} does not allow", rule)
    yield from _extra(facts, "public", "allowing", "allow4", "named4", "permit4", "resolve", "policed")
    if mode is not Mode.PUBLIC:
        yield from network(facts, "NET-30")
    yield from _itself(facts)


ROWS = (
    Row("NET-01", Area.NETWORK, "one interface, one address, one way out", "This app has no other way out than its own.",
        CRITICAL, "CIS-Docker:5.10", _FIX, _NONE, _interfaces, clause=Clause.NETWORK),
    Row("NET-02", Area.NETWORK, "this host's services are unreachable", "This app cannot talk to the machine it runs on.",
        CRITICAL, "CIS-Docker:5.10 ATT&CK:T1046 NIST-800-190:4.4.2", _FIX, _NONE, _host, clause=Clause.NETWORK),
    Row("NET-03", Area.NETWORK, "other apps are unreachable", "This app cannot talk to any other app here.", CRITICAL,
        "CIS-Docker:2.2 CIS-Docker:5.30 NIST-800-190:4.4.2", _FIX, "apps talk over public addresses", _others,
        clause=Clause.NETWORK),
    Row("NET-04", Area.NETWORK, "cloud metadata is unreachable", "This app cannot fetch the machine's cloud credentials.",
        CRITICAL, "ATT&CK:T1552.005 NIST-800-190:4.4.2", _FIX, _NONE, _metadata, clause=Clause.NETWORK),
    Row("NET-05", Area.NETWORK, "private networks are unreachable", "This app cannot reach the provider's internal network.",
        CRITICAL, "NIST-800-190:4.4.2", _FIX, "internal databases need a permit", _private, clause=Clause.NETWORK),
    Row("NET-06", Area.NETWORK, "no multicast, no broadcast", "This app cannot speak to everybody at once.", MODERATE, "",
        _FIX, _NONE, _multicast, clause=Clause.NETWORK),
    Row("NET-07", Area.NETWORK, "no IPv6 side door", "The other Internet protocol leads nowhere.", CRITICAL,
        "CVE-2020-13401 CVE-2024-32473", _FIX, "IPv6-only services are not reached", _ipv6, clause=Clause.NETWORK),
    Row("NET-08", Area.NETWORK, "cannot pretend to be another", "Packets with a false sender go nowhere.", SERIOUS,
        "ATT&CK:T1557", _FIX, _NONE, _spoof, clause=Clause.NETWORK),
    Row("NET-09", Area.NETWORK, "cannot sniff or forge packets", "This app sees no packets but its own.", SERIOUS,
        "CVE-2020-14386 ATT&CK:T1040", "restart the dyno", _NONE, accepts=("EAFNOSUPPORT", "EPERM"),
        calls=(("socket", (17, 3, 0)), ("socket", (17, 2, 0))), clause=Clause.SECCOMP),
    Row("NET-10", Area.NETWORK, "cannot take a neighbour's address", "There is no neighbour to be impersonated.", SERIOUS,
        "ATT&CK:T1557.002", _FIX, _NONE, _arp, clause=Clause.NETWORK),
    Row("NET-11", Area.NETWORK, "no raw sockets", "This app cannot craft packets.", SERIOUS, "CIS-Docker:5.4",
        "restart the dyno", "ping does not work", _ping, accepts=("EPERM",),
        calls=(("socket", (2, 3, 1)), ("socket", (2, 3, 255)), ("socket", (10, 3, 58))), clause=Clause.SECCOMP),
    Row("NET-12", Area.NETWORK, "four kinds of sockets, no others", "40 rarely tested kinds of sockets are closed.",
        SEVERE, "CVE-2026-31431 CVE-2026-43500 CVE-2025-21756", "restart the dyno", _NONE,
        accepts=("EAFNOSUPPORT", "EPERM"), calls=tuple(("socket", (n, 1, 0)) for n in _FAMILIES),
        clause=Clause.SECCOMP),
    Row("NET-13", Area.NETWORK, "one netlink protocol", "The kernel's own control channels are closed.", SEVERE,
        "CVE-2026-43284 CVE-2024-1086", "restart the dyno", _NONE, accepts=("EPERM",),
        calls=tuple(("socket", (NETLINK, 3, n)) for n in (4, 6, 9, 11, 12, 15, 16, 21)), clause=Clause.SECCOMP),
    Row("NET-14", Area.NETWORK, "cannot change its network", "This app cannot give itself addresses or routes.", SERIOUS,
        "ATT&CK:T1562.004", "restart the dyno", _NONE, accepts=("EPERM", "ENODEV")),
    Row("NET-15", Area.NETWORK, "cannot mark its packets", "Nor dodge the rules by marks and options.", SERIOUS, "",
        "restart the dyno", _NONE, accepts=("EPERM",)),
    Row("NET-16", Area.NETWORK, "no privileged ports", "This app cannot pose as a system service.", MINOR,
        "CIS-Docker:5.8", "restart the dyno", "listen on $PORT", _low_ports, accepts=("EACCES",)),
    Row("NET-17", Area.NETWORK, "reached by this host, on $PORT only", "Nobody else can connect to this app.", SERIOUS,
        "CIS-Docker:5.9 CIS-Docker:5.14", _FIX, _NONE, _inbound, clause=Clause.NETWORK),
    Row("NET-18", Area.NETWORK, "no hidden sockets of the host", "Sockets without a file, a classic way out, are not seen.",
        SERIOUS, "CVE-2020-15257", "restart the dyno", _NONE, accepts=("own only", "ECONNREFUSED"),
        clause=Clause.NAMESPACES),
    Row("NET-19", Area.NETWORK, "names by our resolver", "Names resolve to public addresses only.", MODERATE,
        "CVE-2024-29018 ATT&CK:T1071.004", _FIX, "internal names do not resolve", _names, clause=Clause.NETWORK),
    Row("NET-20", Area.NETWORK, "a name that changes opens nothing", "A name that turns to an inner address leads nowhere.",
        SERIOUS, "", _FIX, _NONE, _rebinding, clause=Clause.NETWORK),
    Row("NET-21", Area.NETWORK, "no direct mail", "This app cannot send mail directly.", SERIOUS, "ATT&CK:T1496",
        _FIX, "use a mail service's API, or --smtp", _smtp, clause=Clause.NETWORK),
    Row("NET-22", Area.NETWORK, "floods end at the limit", "This app cannot flood others with connections.", SERIOUS,
        "ATT&CK:T1498", _FIX, "new connections fail at the limit", _flood, clause=Clause.NETWORK),
    Row("NET-23", Area.NETWORK, "a changed policy cuts what is open", "Nothing goes on that is not allowed any more.",
        MODERATE, "", _FIX, "connections are cut", _cut, clause=Clause.NETWORK),
    Row("NET-24", Area.NETWORK, "no connection helpers", "Nothing this app says opens a port for others.", MODERATE,
        "ATT&CK:T1205", _FIX, "active FTP does not work", _helpers, clause=Clause.NETWORK),
    Row("NET-25", Area.NETWORK, "no odd transports", "Rarely tested network protocols are closed.", SERIOUS, "",
        "restart the dyno", _NONE, accepts=("EPERM",),
        calls=(("socket", (2, 5, 132)), ("socket", (2, 6, 33)), ("socket", (2, 2, 136)), ("socket", (2, 1, 262))),
        clause=Clause.SECCOMP),
    Row("NET-26", Area.NETWORK, "no tricks with fragments and options", "Odd packets are denied like plain ones.",
        MODERATE, "", _FIX, _NONE, _options, clause=Clause.NETWORK),
    Row("NET-27", Area.NETWORK, "cannot talk to the hypervisor", "The virtual machine's inner channel is closed.", SERIOUS,
        "CVE-2025-21756", "restart the dyno", _NONE, accepts=("EAFNOSUPPORT", "EPERM"),
        calls=(("socket", (40, 1, 0)), ("socket", (1 << 32 | 40, 1, 0))), clause=Clause.SECCOMP),
    Row("NET-28", Area.NETWORK, "without rules, nothing passes", "Were the rules lost, this app would reach nothing.",
        CRITICAL, "CVE-2025-54388 CVE-2025-54410", _FIX, _NONE, _vanish, clause=Clause.NETWORK),
    Row("NET-29", Area.NETWORK, "the rules are those that were made", "Nobody has changed the wall since it was made.",
        SERIOUS, "ATT&CK:T1562.004", _FIX, _NONE, _whole, clause=Clause.NETWORK),
    Row("NET-30", Area.NETWORK, "reaches what its egress allows", "What was not asked for is not open.", SERIOUS, "", _FIX,
        _NONE, _none_mode, clause=Clause.NETWORK),
)  # fmt: skip
