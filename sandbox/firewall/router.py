"""Makes, examines, repairs and removes the router: a network namespace between the dynos and the host.

In a namespace of our own, nobody's ``nft flush ruleset``, firewalld, ufw or Docker on the host reaches our table.
And should it be lost all the same, routes are in a table that only marked packets are sent to, and only our rules
mark them: without the rules there is no route from a dyno to anywhere.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import Any

from sandbox.config import Config
from sandbox.errors import HostError
from sandbox.firewall import ruleset
from sandbox.firewall.layout import (
    MARK,
    OTHER_MAC,
    ROUTER_MAC,
    RULE_PRIORITY,
    TABLE,
    UPLINK,
    Layout,
)
from sandbox.host import journal, netns
from sandbox.host import syscalls as sys
from sandbox.host.netlink import IFF_NOARP, IFF_UP, MAIN, Netlink, Rule
from sandbox.host.nft import Nft, NftError
from sandbox.policy import egress
from sandbox.policy.egress import RESOLVER

Json = dict[str, Any]
RULES = (Rule(100, TABLE, mark=MARK), Rule(101, TABLE, iif="lo"))
# In the router, before any link is there. rp_filter looks routes up without the mark and would find none; who may
# send what is the table's business.
_ROUTER_SYSCTLS = (
    *(("ipv6/conf/all/disable_ipv6", "1"), ("ipv6/conf/default/disable_ipv6", "1")),
    *(("ipv4/conf/all/rp_filter", "0"), ("ipv4/conf/default/rp_filter", "0")),
    *(("ipv4/conf/all/accept_redirects", "0"), ("ipv4/conf/default/accept_redirects", "0")),
    *(("ipv4/conf/all/send_redirects", "0"), ("ipv4/conf/default/send_redirects", "0")),
    *(("ipv4/conf/all/accept_source_route", "0"), ("ipv4/conf/default/accept_source_route", "0")),
    # The resolver needs no capability to bind port 53 here.
    *(("ipv4/ip_unprivileged_port_start", "53"), ("ipv4/ip_forward", "1")),
    # A closed flow is not counted any more, but tracked; for two minutes, by default.
    *(("netfilter/nf_conntrack_tcp_timeout_time_wait", "10"), ("netfilter/nf_conntrack_tcp_timeout_close", "5")),
)


@contextmanager
def locked(layout: Layout, *, shared: bool = False, wait: bool = True) -> Iterator[None]:
    """The lock on the router: shared for who uses it, exclusive for who makes, repairs or removes it.

    Raises BlockingIOError when it is taken and the caller does not ``wait``.
    """
    layout.make_folders()
    fd = os.open(f"{layout.folder}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(fd)


def standing(layout: Layout) -> bool:
    """Whether the router's namespace is there."""
    try:
        return os.stat(layout.netns).st_dev != os.stat(layout.folder).st_dev
    except FileNotFoundError:
        return False


def guarded(layout: Layout) -> bool:
    """Whether a guard holds its lock; the kernel drops it however the guard ends."""
    return journal.is_live(f"{layout.folder}/guard.lock")


@contextmanager
def inside(layout: Layout) -> Iterator[None]:
    """The calling thread is in the router's network namespace."""
    fd = os.open(layout.netns, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with netns.entered(fd):
            yield
    finally:
        os.close(fd)


def ensure(config: Config, *, forwarding: bool) -> list[str]:
    """Makes the router stand, and returns what had to be repaired (nothing, when it stood or is new).

    ``forwarding``: the host must pass packets on; a dyno with egress ``none`` does not need it. Raises HostError;
    nothing half-made is left behind.
    """
    layout = Layout(config)
    with locked(layout, shared=True):
        if standing(layout) and os.path.exists(layout.state):
            # A living guard has seen every change there was, and repairs on its own.
            state = read_state(layout)
            same = state["pool"] == config.pool and state["deny"] == list(config.deny)
            wanted = state["forwarding"] or not forwarding
            if guarded(layout) and same and wanted and not os.path.exists(layout.dirty):
                return []
            if not faults(layout, forwarding=forwarding):
                return []
    return repair(config, forwarding=forwarding)


def repair(
    config: Config, *, forwarding: bool, by: str = "unknown", since: float | None = None, follow: bool = False
) -> list[str]:
    """Puts back whatever is missing and writes down what it was; makes the router when there is none.

    ``follow``: what is denied stays as the last command made it, whatever the caller's configuration says.

    ``by``: who took it away, ``since``: the moment on the monotonic clock when that was noticed, for the record.
    """
    layout = Layout(config)
    with locked(layout):
        if not (standing(layout) and os.path.exists(layout.state)):
            check_pool(layout)
            remove(layout)
            try:
                _create(layout)
                _repair(layout, faults(layout, forwarding=forwarding), forwarding=forwarding)
            except BaseException:
                remove(layout)
                raise
            return []
        if follow:
            layout = Layout(config._replace(deny=tuple(read_state(layout)["deny"])))
        pool = read_state(layout)["pool"]
        if pool != config.pool:
            raise HostError(
                f"the router stands with the pool {pool}, and the configuration says {config.pool}.",
                hint="stop the dynos, then: sandbox firewall remove",
            )
        with open(layout.dirty, "wb"):
            pass  # until the repair has succeeded, nobody takes a living guard for a proof
        found = faults(layout, forwarding=forwarding)
        _repair(layout, found, forwarding=forwarding)
        os.unlink(layout.dirty)
    # Forwarding that was never needed before is no loss.
    lost = [fault for fault in found if fault != "forwarding" or by != "unknown" or since is not None]
    if lost:
        from sandbox.host.eventlog import record

        window = None if since is None else round((time.monotonic() - since) * 1000, 1)
        record(config, "firewall repaired", what=lost, by=by, window_ms=window)
    return found


def check_pool(layout: Layout) -> None:
    """HostError when the host routes anything of the pool elsewhere already; both prefixes are named."""
    net = Netlink()
    found = net.routes()
    net.close()
    for route in found:
        prefix = IPv4Network(route.prefix)
        # A default route, or the two halves that VPNs split it into, covers everything and means nothing.
        if prefix.prefixlen <= 1 or route.table == layout.route_table or not prefix.overlaps(layout.pool):
            continue
        # What is left of a router of our own that was taken away half-way.
        if route.metric == layout.metric or prefix.network_address in (layout.host_address, layout.router_address):
            continue
        raise HostError(
            f"the address pool {layout.pool} overlaps {prefix}, which this host routes already.",
            hint='choose a free private network: pool = "10.213.0.0/16" in /etc/sandbox/config.toml, or SANDBOX_POOL.',
        )


def _create(layout: Layout) -> None:
    """Everything but what ``_repair`` puts back by itself. The table stands before there is a link."""
    net = Netlink()
    netns.make(layout.netns)
    fd = os.open(layout.netns, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with netns.entered(fd):
            for name, value in _ROUTER_SYSCTLS:
                _sysctl_if_there(name, value)
            inner, nft = Netlink(), Nft()
        for text in ruleset.router(layout, denied(layout), _hosts(layout, net)):
            nft.run(text)
        inner.up(1)
        inner.address(1, IPv4Interface(f"{RESOLVER}/32"))
        net.veth(
            layout.host_link,
            OTHER_MAC,
            group=0,
            peer=UPLINK,
            peer_mac=ROUTER_MAC,
            peer_netns=fd,
            flags=IFF_NOARP,
        )
    finally:
        os.close(fd)
    _sysctl_if_there(f"ipv6/conf/{layout.host_link}/disable_ipv6", "1")
    netns.write_sysctl(f"ipv4/conf/{layout.host_link}/forwarding", "1")
    here, there = net.index(layout.host_link), inner.index(UPLINK)
    inner.address(there, IPv4Interface(layout.router_address))
    net.address(here, IPv4Interface(layout.host_address))
    _wire(layout, net, inner)
    state = {
        "router": _router_digest(nft),
        "host": "",
        "hosts": _hosts(layout, net),
        "sysctls": {},
        "forwarding": False,
    }
    _write_state(layout, {**state, "switched": [], "pool": layout.config.pool, "deny": list(layout.config.deny)})
    for item in (nft, inner, net):
        item.close()


def _wire(layout: Layout, net: Netlink, inner: Netlink) -> None:
    """Both ends of the link up, with their neighbours and routes; what is there already stays.

    Raises HostError when the link is gone: the dynos' way cannot be made again under them.
    """
    try:
        here, there = net.index(layout.host_link), inner.index(UPLINK)
    except OSError as error:
        raise HostError(
            "the link between host and router is gone; running dynos have no network any more.",
            hint="stop them, then: sandbox firewall remove",
        ) from error
    inner.up(there)
    net.up(here)
    inner.neighbour(there, layout.host_address, OTHER_MAC)
    net.neighbour(here, layout.router_address, ROUTER_MAC)
    host, source, pool = f"{layout.host_address}/32", f"{layout.router_address}/32", str(layout.pool)
    table = layout.route_table
    additions: tuple[Callable[[], None], ...] = (
        lambda: inner.route(host, table=TABLE, device=there),
        lambda: inner.route("0.0.0.0/0", table=TABLE, device=there, via=layout.host_address),
        lambda: net.route(source, device=here),
        lambda: net.route(source, table=table, device=here),
        lambda: net.route(pool, table=table, device=here, via=layout.router_address, source=layout.host_address),
        # What others on this host send there (a container behind Docker's masquerading, say) has no way; the host's
        # own packets find the table above first.
        lambda: net.route(pool, metric=layout.metric),
    )
    for add in additions:
        try:
            add()
        except FileExistsError:
            continue


def _lost_routes(layout: Layout, net: Netlink, inner: Netlink) -> bool:
    here, there = net.routes(), inner.routes()
    pool, source = str(layout.pool), f"{layout.router_address}/32"
    wanted = {(pool, layout.route_table), (source, layout.route_table), (source, MAIN)}
    own = {("0.0.0.0/0", TABLE), (f"{layout.host_address}/32", TABLE)}
    return (
        not wanted <= {(route.prefix, route.table) for route in here}
        or not own <= {(route.prefix, route.table) for route in there}
        or not any(route.prefix == pool and route.metric == layout.metric for route in here)
    )


def faults(layout: Layout, *, forwarding: bool) -> list[str]:
    """What is not as it was made, in words; empty when the wall stands. Reads only."""
    state = read_state(layout)
    found = []
    net, host_nft = Netlink(), Nft()
    with inside(layout):
        inner, nft = Netlink(), Nft()
    try:
        if _router_digest(nft) != state["router"]:
            found.append("router table")
        if set(inner.rules()) & set(RULES) != set(RULES):
            found.append("router routing rules")
        if _host_digest(layout, host_nft) != state["host"] or _switched(state) != state["switched"]:
            found.append("host table")
        if state["deny"] != list(layout.config.deny):
            found.append("denied ranges")
        if _lost_routes(layout, net, inner):
            found.append("routes")
        if _host_rule(layout) not in net.rules():
            found.append("host routing rule")
        if state["hosts"] != _hosts(layout, net):
            found.append("host addresses")
        if any(not _accepted(layout, host_nft, chain) for chain in _foreign_chains(host_nft)):
            found.append("accept in another firewall")
        if forwarding and _not_forwarding(layout, net):
            found.append("forwarding")
        for link, owner in ((layout.host_link, net), (UPLINK, inner)):
            if not owner.links().get(link, (0, 0))[1] & IFF_UP:
                found.append("link")
    finally:
        for item in (nft, host_nft, inner, net):
            item.close()
    return found


def _repair(layout: Layout, found: list[str], *, forwarding: bool) -> None:
    """Puts back what is missing, each by one transaction. A lost link cannot be: HostError."""
    state = read_state(layout)
    net, host_nft = Netlink(), Nft()
    with inside(layout):
        inner, nft = Netlink(), Nft()
    try:
        hosts = _hosts(layout, net)
        if {"router table", "denied ranges"} & set(found):
            filled, rules = ruleset.router(layout, denied(layout), hosts)
            empty = "".join(f"table {t}\ndelete table {t}\n" for t in (ruleset.TABLE, "arp sandbox"))
            nft.run(empty + filled + "".join(ruleset.add(record_elements(record)) for record in records(layout)))
            nft.run(rules)
        elif "host addresses" in found:
            nft.run(ruleset.own_addresses(hosts, state["hosts"]))
        if {"router table", "denied ranges", "host addresses"} & set(found):
            state |= {"router": _router_digest(nft), "hosts": hosts, "deny": list(layout.config.deny)}
        for rule in RULES:
            inner.rule(rule)
        idle = _not_forwarding(layout, net) if forwarding else []
        if forwarding:
            state["forwarding"] = True
            state["sysctls"] |= {name: "0" for name in idle if name != layout.host_link}
            _write_state(layout, state)  # before it is done: it must be undone
        if "host table" in found or _switched(state) != state["switched"]:
            table = f"inet {layout.host_table}"
            state["switched"] = _switched(state)
            host_nft.run(f"table {table}\ndelete table {table}\n" + ruleset.host(layout, state["switched"]))
            state["host"] = _host_digest(layout, host_nft)
        for name in idle:
            netns.write_sysctl(f"ipv4/conf/{name}/forwarding", "1")
        _write_state(layout, state)
        net.rule(_host_rule(layout))
        for where in _foreign_chains(host_nft):
            if not _accepted(layout, host_nft, where):
                _accept(layout, host_nft, where)
        _wire(layout, net, inner)
    finally:
        for item in (nft, host_nft, inner, net):
            item.close()


def _switched(state: Json) -> list[str]:
    """The devices that forward because of us alone; none, once somebody has switched the whole host on."""
    return [] if netns.read_sysctl("ipv4/ip_forward") == "1" else sorted(state["sysctls"])


def _accept(layout: Layout, nft: Nft, where: tuple[str, str, str]) -> None:
    """Our accept in another firewall's chain; HostError when that table is closed to everybody but its owner."""
    try:
        nft.run(_forget_accepts(layout, nft, where) + _accepts(layout, where))
    except NftError as error:
        if "Operation not permitted" not in error.message:
            raise
        # nftables since 6.9 refuses every change of a table with the flag `owner` by another than its maker.
        raise HostError(
            f"table {where[0]} {where[1]} refuses what it does not know, and nobody but its owner may change it: the "
            "dynos would have no network.",
            hint="firewalld: set NftablesTableOwner=no in /etc/firewalld/firewalld.conf and reload it.",
        ) from error


def _accepts(layout: Layout, where: tuple[str, str, str]) -> str:
    rule = "insert rule {} {} {} ".format(*where)
    return "".join(
        f'{rule} {direction} "{layout.host_link}" counter accept comment "{_comment(layout)}"\n'
        for direction in ("iifname", "oifname")
    )


def _forget_accepts(layout: Layout, nft: Nft, where: tuple[str, str, str]) -> str:
    rule = "delete rule {} {} {} handle ".format(*where)
    return "".join(f"{rule} {handle}\n" for handle in _ours(layout, nft, where))


def remove(layout: Layout) -> None:
    """Takes the router down and leaves the host as it was; what was undone before is left alone.

    The caller holds the lock and stopped the guard.

    The state goes first: a router without it is not standing, so an interrupted take-down is only begun again.
    """
    state = read_state(layout) if os.path.exists(layout.state) else {}
    layout = Layout(layout.config._replace(pool=state.get("pool", layout.config.pool)))
    for name, value in state.get("sysctls", {}).items():
        # Somebody else switched forwarding on for the whole host meanwhile: it is theirs now.
        if netns.read_sysctl("ipv4/ip_forward") == "0":
            _sysctl_if_there(f"ipv4/conf/{name}/forwarding", value)
    for path in (layout.state, layout.dirty):
        if os.path.exists(path):
            os.unlink(path)
    net, nft = Netlink(), Nft()
    try:
        if nft.exists(f"table inet {layout.host_table}"):
            nft.run(f"delete table inet {layout.host_table}")
        for where in _foreign_chains(nft, refusing=False):
            if text := _forget_accepts(layout, nft, where):
                nft.run(text)
        net.rule(_host_rule(layout), remove=True)
        net.remove_link(layout.host_link)
        net.route(str(layout.pool), metric=layout.metric, remove=True)
    finally:
        nft.close()
        net.close()
    try:
        sys.umount(layout.netns, detach=True)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):
            raise
    if os.path.exists(layout.netns):
        os.unlink(layout.netns)


def denied(layout: Layout, hosts: Iterable[str] = ()) -> tuple[egress.Denied, ...]:
    """What no dyno of this instance ever reaches: the fixed ranges, the pool, the operator's, and ``hosts``."""
    deny = [egress.parse_network(text, where="deny") for text in layout.config.deny]
    return egress.denied_ranges(pool=layout.config.pool, hosts=hosts, deny=deny)


def denied_now(layout: Layout) -> tuple[egress.Denied, ...]:
    """The same with the addresses that the host has at this moment."""
    net = Netlink()
    hosts = _hosts(layout, net)
    net.close()
    return denied(layout, hosts)


def _hosts(layout: Layout, net: Netlink) -> list[str]:
    """Every address of the host, whatever its interface; loopback is a range of its own."""
    addresses = {address for _, address in net.addresses() if not address.startswith("127.")}
    return sorted(addresses | {str(layout.host_address)}, key=IPv4Address)


def _host_rule(layout: Layout) -> Rule:
    """Only what the host itself sends finds the way to a dyno."""
    return Rule(RULE_PRIORITY, layout.route_table, iif="lo", to=str(layout.pool))


def _not_forwarding(layout: Layout, net: Netlink) -> list[str]:
    """The devices that would have to forward and do not: our link, and where the default routes go.

    Not the whole host: it becomes a router for these devices only, and only for our link's flows.
    """
    names = {index: name for name, (index, _) in net.links().items()}
    devices = {names.get(route.device, "") for route in net.routes() if route.prefix == "0.0.0.0/0"}
    return [name for name in sorted({layout.host_link, *devices} - {""}) if _is_switched_off(name)]


def _is_switched_off(device: str) -> bool:
    try:
        return netns.read_sysctl(f"ipv4/conf/{device}/forwarding") == "0"
    except FileNotFoundError:
        return False  # a device that is gone; that our link is gone is a fault of its own


def stopped_forwarding(layout: Layout) -> bool:
    """Whether forwarding is not as we left it: a few file reads, cheap enough for every second."""
    state = read_state(layout)
    if not state["forwarding"]:
        return False
    if _switched(state) != state["switched"]:
        return True
    for name in (layout.host_link, *state["sysctls"]):
        try:
            if netns.read_sysctl(f"ipv4/conf/{name}/forwarding") == "0":
                return True
        except FileNotFoundError:
            continue  # a device that went away
    return False


def _foreign_chains(nft: Nft, *, refusing: bool = True) -> list[tuple[str, str, str]]:
    """Other firewalls' forward chains: (family, table, chain); those that refuse what they do not know, or all."""
    found = []
    for item in nft.listing("chains"):
        chain = item.get("chain", {})
        if chain.get("hook") != "forward" or chain["family"] not in ("ip", "inet") or "sandbox" in chain["table"]:
            continue
        where = (chain["family"], chain["table"], chain["name"])
        if not refusing or chain.get("policy") == "drop" or _ends_in_refusal(nft, where):
            found.append(where)
    return found


def _ends_in_refusal(nft: Nft, where: tuple[str, str, str]) -> bool:
    """Firewalld's chains have policy accept and a last rule that rejects."""
    rules = [item["rule"] for item in nft.listing("chain " + " ".join(where)) if "rule" in item]
    last = rules[-1]["expr"] if rules else []
    return bool(last) and len(last) == 1 and ("reject" in last[0] or "drop" in last[0])


def _comment(layout: Layout) -> str:
    return f"sandbox {layout.host_link}"


def _ours(layout: Layout, nft: Nft, where: tuple[str, str, str]) -> list[int]:
    rules = (item.get("rule", {}) for item in nft.listing("chain " + " ".join(where)))
    return [int(rule["handle"]) for rule in rules if rule.get("comment") == _comment(layout)]


def _accepted(layout: Layout, nft: Nft, where: tuple[str, str, str]) -> bool:
    return len(_ours(layout, nft, where)) == 2


def _router_digest(nft: Nft) -> str:
    """Over every rule, chain and set of the router and the denied ranges, without handles and without dynos."""
    lists = [nft.listing(f"table {ruleset.TABLE}", terse=True), nft.listing("table arp sandbox", terse=True)]
    return _digest([*lists, nft.listing(f"map {ruleset.TABLE} deny4"), nft.listing(f"set {ruleset.TABLE} hosts4")])


def _host_digest(layout: Layout, nft: Nft) -> str:
    return _digest(nft.listing(f"table inet {layout.host_table}"))


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(_without_handles(value), sort_keys=True).encode()).hexdigest()


def _without_handles(value: object) -> object:
    if isinstance(value, dict):
        return {k: _without_handles(v) for k, v in value.items() if k not in ("handle", "metainfo")}
    return [_without_handles(item) for item in value] if isinstance(value, list) else value


def _sysctl_if_there(name: str, value: str) -> None:
    try:
        netns.write_sysctl(name, value)
    except FileNotFoundError:
        return  # a kernel without IPv6, or a link that is gone


def read_state(layout: Layout) -> Json:
    """What was found and made when the router was set up."""
    with open(layout.state, encoding="utf-8") as file:
        return dict(json.load(file))


def _write_state(layout: Layout, state: Json) -> None:
    draft = f"{layout.state}.new"
    with open(draft, "w", encoding="utf-8") as file:
        json.dump(state, file)
    os.rename(draft, layout.state)


def records(layout: Layout) -> list[Json]:
    """The record of every admitted dyno."""
    found = []
    for name in sorted(os.listdir(layout.records)) if os.path.isdir(layout.records) else []:
        if name.endswith(".json"):
            record = read_record(f"{layout.records}/{name}")
            if record is not None:
                found.append(record)
    return found


def read_record(path: str) -> Json | None:
    try:
        with open(path, encoding="utf-8") as file:
            return dict(json.load(file))
    except FileNotFoundError:
        return None


def record_elements(record: Json) -> list[ruleset.Element]:
    return [ruleset.Element(*item) for item in record["elements"]]
