"""The tables as text, from numbers and ``ipaddress`` values only. Pure.

The rules never grow: a dyno is a handful of set elements. What the order of the rules means:

- raw prerouting, before connection tracking: who sends (nobody but the owner of an address), where to (never
  anything local). A refused flood costs no connection-tracking entry. A packet that passes gets a mark, and only
  marked packets are routed: when this table is lost, nothing is forwarded any more.
- forward, for the first packet of a flow: the denied ranges once more, then the app's own mode and list, then its
  rates. An established flow is not asked again, so a connection outlives the DNS answer that opened it.

The ranges are looked up twice because a change of the table is not atomic for a packet that is on its way: the kernel
chooses the rules when the packet enters a hook, and the elements at each lookup. A packet between two generations
found the old rules and no ranges (seen once, in a test that floods during repairs); it does not find that twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address
from typing import NamedTuple

from sandbox.firewall.layout import GROUP, LOG_GROUP, MARK, POLICY_PORT, UPLINK, Layout, Place
from sandbox.policy.egress import RESOLVER, Denied, Egress, Mode, Network, Reason
from sandbox.policy.sizes import SIZES, Traffic

TABLE = "inet sandbox"
FLOWS = sorted({size.traffic.flows for size in SIZES.values()})
_DNS_RATE = "limit rate over 50/second burst 100 packets"


def _mark(reason: Reason) -> str:
    return f"meta mark set {reason:d} goto deny"


def router(layout: Layout, denied: tuple[Denied, ...], hosts: Iterable[str]) -> tuple[str, str]:
    """The router's tables, as two transactions: sets with their elements and empty chains, then the rules.

    Not in one: rules are in force at the moment of the commit, and a set of ranges is published after it. For that
    moment the rules would find no range that denies. Without rules, nothing is marked, so nothing is routed.
    A set that grows never shares a rule with a verdict: a full set ends its rule.
    """
    host, source = layout.host_address, layout.router_address
    per_dyno = "size 65535;"
    place = "ifname . ipv4_addr . inet_proto . inet_service"
    # The kernel forgets a counter of flows when it is zero, and a limit that lived in that element with it. So who
    # has which limit is in sets of its own, one for each limit that a size has.
    sets = "\n".join(
        f"  set flows_{most} {{ type ifname; {per_dyno} }}\n"
        f"  set counted_{most} {{ type ifname; {per_dyno} flags dynamic; }}"
        for most in FLOWS
    )
    caps = "\n".join(
        f"    iifname @flows_{most} add @counted_{most} {{ iifname ct count over {most} }} {_mark(Reason.CONNECTIONS)}"
        for most in FLOWS
    )
    text = f"""
table arp sandbox {{
  chain input {{ type filter hook input priority filter; policy drop; counter; }}
  chain output {{ type filter hook output priority filter; policy drop; counter; }}
}}
table {TABLE} {{
  set src4 {{ type ifname . ipv4_addr; {per_dyno} counter; }}
  map dyno {{ type ifname : mark; {per_dyno} }}
  set public {{ type ifname; {per_dyno} }}
  set allowing {{ type ifname; {per_dyno} }}
  set policed {{ type ifname; {per_dyno} }}
  set resolve {{ type ifname; {per_dyno} }}
  set smtp {{ type ifname; {per_dyno} }}
  set permit4 {{ type {place}; flags interval; counter; }}
  set allow4 {{ type {place}; flags interval; counter; }}
  set named4 {{ type ifname . ipv4_addr; {per_dyno} flags timeout; counter; }}
  set reply4 {{ type ifname . inet_service; {per_dyno} }}
  set inbound4 {{ type ifname . ipv4_addr . inet_service; {per_dyno} counter; }}
{sets}
  set fresh {{ type ifname; {per_dyno} limit rate over 1/second; }}
  set upload {{ type ifname; {per_dyno} limit rate over 1 mbytes/second; }}
  set download {{ type ifname; {per_dyno} limit rate over 1 mbytes/second; }}
  set hosts4 {{ type ipv4_addr; }}
  map deny4 {{ type ipv4_addr : mark; flags interval; counter; }}
  set counted_dns {{ type ifname; {per_dyno} flags dynamic; }}
  set asked {{ type ifname; {per_dyno} flags dynamic,timeout; timeout 1m; }}
  set total {{ type ifname . mark; {per_dyno} flags dynamic,timeout; timeout 1h; counter; }}
  set detail {{ type ifname; {per_dyno} flags dynamic,timeout; timeout 15m; }}
  set denied4 {{ type {place} . mark; {per_dyno} flags dynamic,timeout; timeout 15m; counter; }}
  set deniedx {{ type ifname . ipv4_addr . inet_proto . mark; {per_dyno} flags dynamic,timeout; timeout 15m; counter; }}
  set denied6 {{ type ifname . ipv6_addr . inet_proto . mark; {per_dyno} flags dynamic,timeout; timeout 15m; counter; }}
  set refused4 {{ type {place}; {per_dyno} flags dynamic,timeout; timeout 15m; counter; }}
  set logged {{ type ifname; {per_dyno} flags dynamic,timeout; timeout 1m; }}

  chain prerouting {{
    type filter hook prerouting priority raw; policy accept;
    iifgroup {GROUP} jump from_dyno
    iifname "{UPLINK}" meta nfproto ipv4 meta mark set {MARK}
  }}
  chain from_dyno {{
    meta nfproto != ipv4 {_mark(Reason.IPV6)}
    iifname . ip saddr != @src4 {_mark(Reason.SPOOFED)}
    iifname @upload meta mark set {Reason.BANDWIDTH:d} goto shaped
    ip daddr {host} tcp flags & (syn|ack) != syn iifname . tcp sport @reply4 goto pass
    ip daddr {RESOLVER} goto ask
    ip daddr @hosts4 {_mark(Reason.HOST)}
    meta l4proto {{ tcp, udp }} iifname . ip daddr . meta l4proto . th dport @permit4 goto pass
    meta mark set ip daddr map @deny4 goto deny
    fib daddr type {{ local, broadcast, multicast, anycast }} {_mark(Reason.HOST)}
    icmp type {{ destination-unreachable, time-exceeded, parameter-problem }} counter drop
    meta l4proto != {{ tcp, udp }} {_mark(Reason.PROTOCOL)}
    tcp dport 25 iifname != @smtp {_mark(Reason.SMTP)}
    goto pass
  }}
  chain pass {{
    meta mark set {MARK}
  }}
  chain ask {{
    iifname != @resolve {_mark(Reason.DNS)}
    meta l4proto != {{ tcp, udp }} {_mark(Reason.PROTOCOL)}
    th dport != 53 {_mark(Reason.HOST)}
    update @asked {{ iifname {_DNS_RATE} }} {_mark(Reason.DNS_RATE)}
    goto pass
  }}
  chain deny {{
    update @total {{ iifname . meta mark }}
    meta l4proto {{ tcp, udp }} iifname . ip daddr . meta l4proto . th dport . meta mark @denied4 goto log_drop
    meta l4proto != {{ tcp, udp }} iifname . ip daddr . meta l4proto . meta mark @deniedx goto log_drop
    iifname . ip6 daddr . meta l4proto . meta mark @denied6 goto log_drop
    update @detail {{ iifname limit rate over 2/second burst 1000 packets }} goto log_drop
    meta l4proto {{ tcp, udp }} update @denied4 {{ iifname . ip daddr . meta l4proto . th dport . meta mark }}
    meta l4proto != {{ tcp, udp }} update @deniedx {{ iifname . ip daddr . meta l4proto . meta mark }}
    update @denied6 {{ iifname . ip6 daddr . meta l4proto . meta mark }}
    goto log_drop
  }}
  chain log_drop {{
    update @logged {{ iifname limit rate 2/second burst 10 packets }} log group {LOG_GROUP} snaplen 64
    counter drop
  }}
  chain shaped {{
    update @total {{ iifname . meta mark }}
    drop
  }}
  chain dstnat {{
    type nat hook prerouting priority dstnat; policy accept;
    iifname @policed ip daddr {RESOLVER} meta l4proto {{ tcp, udp }} th dport 53 dnat ip to {RESOLVER}:{POLICY_PORT}
  }}
  chain input {{
    type filter hook input priority filter; policy drop;
    iif lo accept
    tcp dport {{ 53, {POLICY_PORT} }} ct state new add @counted_dns {{ iifname ct count over 4 }} drop
    iifgroup {GROUP} ip daddr {RESOLVER} meta l4proto {{ tcp, udp }} th dport {{ 53, {POLICY_PORT} }} goto asked_here
  }}
  chain asked_here {{
    ct mark set iifname map @dyno
    accept
  }}
  chain output {{
    type filter hook output priority filter; policy drop;
    oif lo accept
    oifgroup {GROUP} ip saddr {RESOLVER} meta l4proto {{ tcp, udp }} th sport {{ 53, {POLICY_PORT} }} accept
    oifgroup {GROUP} icmp type {{ destination-unreachable, time-exceeded }} accept
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
    iifgroup {GROUP} oifname "{UPLINK}" goto outward
    iifname "{UPLINK}" oifgroup {GROUP} goto inward
  }}
  chain outward {{
    ct state established,related accept
    ct state invalid counter drop
    ip daddr @hosts4 {_mark(Reason.HOST)}
    meta l4proto {{ tcp, udp }} iifname . ip daddr . meta l4proto . th dport @permit4 goto rates
    meta mark set ip daddr map @deny4 goto deny
    iifname @public goto rates
    meta l4proto {{ tcp, udp }} iifname . ip daddr . meta l4proto . th dport @allow4 goto rates
    iifname @allowing iifname . ip daddr @named4 goto rates
    iifname @allowing {_mark(Reason.NOT_LISTED)}
    {_mark(Reason.EGRESS_NONE)}
  }}
  chain rates {{
    iifname @fresh {_mark(Reason.NEW_RATE)}
{caps}
    ct mark set iifname map @dyno
    accept
  }}
  chain inward {{
    oifname @download drop
    ct state established,related accept
    ip saddr {host} oifname . ip daddr . tcp dport @inbound4 ct state new ct mark set oifname map @dyno accept
    meta l4proto {{ tcp, udp }} update @refused4 {{ oifname . ip saddr . meta l4proto . th dport }}
    counter drop
  }}
  chain srcnat {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {layout.pool} ip saddr != {host} oifname "{UPLINK}" snat ip to {source}
  }}
}}
"""  # noqa: S608 - not SQL: "set" and "update" are words of nftables, too
    skeleton, rules = _split(text)
    deny = ", ".join(f"{_range(item.first, item.last)} : {item.reason:d}" for item in denied)
    filled = f"add element {TABLE} deny4 {{ {deny} }}\nadd element {TABLE} hosts4 {{ {', '.join(hosts)} }}\n"
    return skeleton + filled, rules


def _split(text: str) -> tuple[str, str]:
    """The tables without the rules of their chains, and the rules."""
    skeleton: list[str] = []
    rules: list[str] = []
    inside = False
    for line in text.splitlines():
        begins, ends = line.startswith("  chain ") and not line.endswith("}"), line == "  }"
        if inside and not ends:
            (skeleton if line.startswith("    type ") else rules).append(line)
            continue
        inside = begins
        skeleton.append(line)
        if begins or ends or line.startswith(("table inet", "}")):
            rules.append(line)
    # The other table has no rules of its own: all it needs is in the skeleton.
    start = next(number for number, line in enumerate(rules) if line.startswith("table inet"))
    return "\n".join(skeleton) + "\n", "\n".join(rules[start:]) + "\n"


def own_addresses(now: Iterable[str], before: Iterable[str]) -> str:
    """The text that changes the host's addresses in the table, one by one and new ones first."""
    come, gone = sorted(set(now) - set(before)), sorted(set(before) - set(now))
    lines = [f"add element {TABLE} hosts4 {{ {address} }}" for address in come]
    lines += [f"delete element {TABLE} hosts4 {{ {address} }}" for address in gone]
    return "".join(f"{line}\n" for line in lines)


def host(layout: Layout, switched: Iterable[str]) -> str:
    """The host's table: what leaves the router is never for the host itself, and nobody but the host asks a dyno.

    ``switched``: the devices that forward because of us. They forward for our link and for nobody else: a neighbour
    who takes this host for a router finds that it is none. Flows that have closed are forgotten soon, so that one
    dyno's cannot fill what the host tracks.
    """
    up, address, source = layout.host_link, layout.host_address, layout.router_address
    names = ", ".join(f'"{name}"' for name in switched)
    # Another instance's link is another instance's business.
    others = f'iifname {{ {names} }} oifname != "sbx-*" counter drop' if names else ""
    return f"""
table inet {layout.host_table} {{
  ct timeout brief {{
    protocol tcp; l3proto ip;
    policy = {{ time_wait : 10, close : 5 }}
  }}
  chain prerouting {{
    type filter hook prerouting priority raw; policy accept;
    iifname "{up}" jump from_router
  }}
  chain from_router {{
    ip saddr {layout.pool} ip saddr != {source} ip daddr {address} tcp flags & (syn|ack) != syn return
    ip saddr != {source} counter drop
    meta nfproto != ipv4 counter drop
    fib daddr type != unicast counter drop
  }}
  chain closing {{
    type filter hook prerouting priority mangle; policy accept;
    iifname "{up}" ct state new meta l4proto tcp ct timeout set "brief"
  }}
  chain forward {{
    type filter hook forward priority filter; policy accept;
    oifname "{up}" ct state established,related accept
    oifname "{up}" counter drop
    {others}
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {source} oifname != "{up}" masquerade
  }}
}}
"""


class Element(NamedTuple):
    """One element of a set: ``key`` as nftables reads it, ``more``: its own limit, or a map's value."""

    set: str
    key: str
    more: str = ""


def elements(link: str, place: Place, egress: Egress, traffic: Traffic, port: int) -> tuple[Element, ...]:
    """All that makes a dyno known to the router. ``port``: what the host may ask for; 0 for none."""
    name = f'"{link}"'
    burst = max(1 << 20, traffic.bytes_per_s // 20)
    rate = f"limit rate over {traffic.bytes_per_s} bytes/second burst {burst} bytes"
    found = [
        Element("src4", f"{name} . {place.address}"),
        Element("dyno", name, f": {place.number}"),
        Element(f"flows_{traffic.flows}", name),
        Element("fresh", name, f"limit rate over {traffic.flows_per_s}/second burst {traffic.flows_per_s} packets"),
        Element("upload", name, rate),
        Element("download", name, rate),
    ]
    if egress.mode is Mode.PUBLIC:
        found.append(Element("public", name))
    if egress.mode is Mode.ALLOW:
        found.append(Element("allowing", name))
    if egress.policed:
        found.append(Element("policed", name))
    if egress.resolves:
        found.append(Element("resolve", name))
    if egress.smtp:
        found.append(Element("smtp", name))
    if port:
        found += [Element("reply4", f"{name} . {port}"), Element("inbound4", f"{name} . {place.address} . {port}")]
    found += _networks("permit4", name, egress.permitted)
    found += _networks("allow4", name, egress.networks)
    return tuple(found)


def _networks(which: str, name: str, networks: Iterable[Network]) -> list[Element]:
    return [
        Element(which, f"{name} . {_range(item.first, item.last)} . {protocol} . {_ports(ports)}")
        for item in networks
        for protocol in ("tcp", "udp")
        for ports in item.ports
    ]


def _ports(ports: tuple[int, int]) -> str:
    return str(ports[0]) if ports[0] == ports[1] else f"{ports[0]}-{ports[1]}"


def _range(first: int, last: int) -> str:
    start, end = IPv4Address(first), IPv4Address(last)
    return str(start) if first == last else f"{start}-{end}"


def add(items: Iterable[Element], *, table: str = TABLE) -> str:
    """The text that adds the elements, in one transaction with whatever follows it."""
    return "".join(f"add element {table} {item.set} {{ {item.key} {item.more} }}\n" for item in items)


def remove(items: Iterable[Element], *, table: str = TABLE) -> str:
    """The text that removes the elements; the transaction is refused when one of them is not there."""
    return "".join(f"delete element {table} {item.set} {{ {item.key} }}\n" for item in items)


def replace(item: Element, *, table: str = TABLE) -> str:
    """The text that adds the element anew, with a time of its own, whether it is there or not.

    After an add in the same transaction it is there for certain, so the delete is not refused.
    """
    return add([item], table=table) + remove([item], table=table) + add([item], table=table)
