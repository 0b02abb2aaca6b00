"""Lends one dyno its place in the network: an address, a link, and the elements that make the table know it.

The order is the point. The record is on disk before the kernel knows anything; the elements are in the table before
the link is up; and all of it before the gate opens.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from ipaddress import IPv4Address, IPv4Interface
from typing import NamedTuple

from sandbox.config import Config
from sandbox.errors import HostError, NotFound
from sandbox.firewall import router, ruleset
from sandbox.firewall.layout import GROUP, OTHER_MAC, ROUTER_MAC, TABLE, Layout, Place, link_name
from sandbox.host import netns, nfnetlink
from sandbox.host.netlink import IFF_NOARP, MAIN, Netlink
from sandbox.host.nft import Nft, NftError, NoSuchTable, elements
from sandbox.policy.egress import Egress
from sandbox.policy.sizes import Traffic


class Wish(NamedTuple):
    """What is asked for one dyno. ``port``: where the host may reach it, 0 for nowhere."""

    container_id: str
    name: str
    app: str
    egress: Egress
    traffic: Traffic
    port: int = 0


def lease(config: Config, wish: Wish) -> Place:
    """Takes a free /30 by writing the dyno's record; HostError when the pool is used up."""
    layout = Layout(config)
    link = link_name(wish.container_id)
    numbers = layout.numbers()
    layout.make_folders()
    draft = f"{layout.records}/.{link}"
    seed = int.from_bytes(os.urandom(4))
    # At random: an address that was just given back may still get packets that its last owner asked for.
    candidates = [1 + (seed + step * 0x9E3779B1) % len(numbers) for step in range(16)]
    for number in itertools.chain(candidates, _unused(layout)):
        try:
            place = layout.place(number)
        except HostError:
            continue
        items = ruleset.elements(link, place, wish.egress, wish.traffic, wish.port)
        record = {
            "link": link,
            "id": wish.container_id,
            "name": wish.name,
            "app": wish.app,
            "number": number,
            "address": str(place.address),
            "gateway": str(place.gateway),
            "port": wish.port,
            "traffic": wish.traffic._asdict(),
            "egress": wish.egress.document(),
            "elements": items,
        }
        with open(draft, "w", encoding="utf-8") as file:
            json.dump(record, file)
        try:
            os.link(draft, layout.record(place.address))  # fails when somebody has it: this is the lease
        except FileExistsError:
            continue
        finally:
            os.unlink(draft)
        return place
    raise HostError(
        f"no free /30 is left in the pool {layout.pool}: all {layout.places} are in use.",
        hint="stop a dyno, or configure a larger pool: sandbox ps lists the dynos.",
    )


def _unused(layout: Layout) -> Iterator[int]:
    """Every number without a record, looked up only after the random ones were all taken."""
    taken = set(os.listdir(layout.records))
    base = int(layout.pool.network_address)
    yield from (n for n in layout.numbers() if f"{IPv4Address(base + 4 * n + 2)}.json" not in taken)


def connect(config: Config, place: Place, namespace: str) -> None:
    """Wires the network namespace at that path to the router and admits it. Raises HostError, OSError."""
    layout = Layout(config)
    with os_open(namespace) as dyno:
        with router.locked(layout, shared=True):
            record = router.read_record(layout.record(place.address))
            if record is None:
                raise HostError(f"the record of {place.address} is gone.", hint="start it again.")
            with router.inside(layout):
                net, nft = Netlink(), Nft()
                # Flows of whoever had this address before.
                nfnetlink.cut_flows(place.number)
            nft.run(ruleset.add(router.record_elements(record)))
            net.veth(
                record["link"],
                ROUTER_MAC,
                group=GROUP,
                peer="eth0",
                peer_mac=OTHER_MAC,
                peer_netns=dyno,
                flags=IFF_NOARP,
            )
            index = net.index(record["link"])
            net.address(index, IPv4Interface(place.gateway))
            net.up(index)
            net.neighbour(index, place.address, OTHER_MAC)
            net.route(f"{place.address}/32", table=TABLE, device=index)
            nft.close()
            net.close()
        with netns.entered(dyno):
            own = Netlink()
            _own_side(own, place)
            own.close()


def _own_side(net: Netlink, place: Place) -> None:
    """The dyno's end: an address in a /30, one neighbour that nobody can replace, one way out, no IPv6."""
    try:
        netns.write_sysctl("ipv6/conf/eth0/disable_ipv6", "1")
    except FileNotFoundError:
        pass  # a kernel without IPv6
    index = net.index("eth0")
    net.address(index, place.interface)
    net.up(index)
    net.neighbour(index, place.gateway, ROUTER_MAC)
    net.route(str(place.interface.network), device=index)
    net.route("0.0.0.0/0", device=index, via=place.gateway)


def differences(config: Config, place: Place, pid: int) -> Iterator[tuple[str, str]]:
    """What is not as it should be, as (promised, observed): in the dyno's own namespace and in the router's table."""
    yield from own_differences(place, pid)
    layout = Layout(config)
    record = router.read_record(layout.record(place.address))
    if record is None:
        yield "a record of its place", "none"
        return
    with router.inside(layout):
        nft = Nft()
    for item in unknown(nft, router.record_elements(record)):
        yield f"known to the router as {item.set} {item.key}", "unknown"
    nft.close()


def own_differences(place: Place, pid: int) -> Iterator[tuple[str, str]]:
    """What is not as it should be in the dyno's own network namespace, as (promised, observed)."""
    with os_open(f"/proc/{pid}/ns/net") as fd, netns.entered(fd):
        net = Netlink()
        links = net.links()
        addresses = [address for index, address in net.addresses() if index != links["lo"][0]]
        device = links.get("eth0", (0, 0))[0]
        routes = sorted(route.prefix for route in net.routes() if route.table == MAIN)
        net.close()
        ipv6 = _ipv6_addresses()
    if sorted(links) != ["eth0", "lo"]:
        yield "interfaces lo and eth0", ", ".join(sorted(links)) or "none"
    if not links.get("eth0", (0, 0))[1] & IFF_NOARP:
        yield "no ARP on eth0", "ARP"
    if addresses != [str(place.address)]:
        yield f"address {place.address}", ", ".join(addresses) or "none"
    if routes != sorted(("0.0.0.0/0", str(place.interface.network))) or not device:
        yield "a way to the router and no other", ", ".join(routes) or "none"
    if ipv6:
        yield "no IPv6 address but loopback's", ", ".join(ipv6)


def wired(layout: Layout, link: str, pid: int) -> Iterator[tuple[str, str]]:
    """Whether the dyno's eth0 is the other end of its link at the router, as (promised, observed) when it is not."""
    with os_open(f"/proc/{pid}/ns/net") as fd:
        with netns.entered(fd):
            own = Netlink()
        with router.inside(layout):
            net = Netlink()
        try:
            here = own.index("eth0")
            seen = net.peer(link)
            if seen != (here, net.number_of(fd)):
                yield f"eth0 is the other end of the router's {link}", "it is another link's"
        except OSError as error:
            yield f"eth0 is the other end of the router's {link}", f"{error.filename or link}: {error.strerror}"
        finally:
            own.close()
            net.close()


def unknown(nft: Nft, items: Sequence[ruleset.Element]) -> list[ruleset.Element]:
    """Which of those elements the router does not have: asked for all at once, and one by one when that fails."""
    try:
        nft.run("".join(_get(item) for item in items))
    except NftError:
        return [item for item in items if not _has(nft, item)]
    return []


def _has(nft: Nft, item: ruleset.Element) -> bool:
    try:
        nft.run(_get(item))
    except NftError:
        return False
    return True


def _get(item: ruleset.Element) -> str:
    return f"get element {ruleset.TABLE} {item.set} {{ {item.key} }}\n"


def _ipv6_addresses() -> list[str]:
    try:
        with open("/proc/thread-self/net/if_inet6", encoding="ascii") as file:
            return [line.split()[0] for line in file if line.split()[-1] != "lo"]
    except FileNotFoundError:
        return []  # a kernel without IPv6


@contextmanager
def os_open(path: str) -> Iterator[int]:
    """A descriptor for as long as the block runs."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def withdraw(config: Config, link: str, address: str = "") -> None:
    """Takes a dyno's place back: link, elements, flows, record. What is gone already is left alone."""
    layout = Layout(config)
    with router.locked(layout, shared=True):
        found = [router.read_record(layout.record(address))] if address else router.records(layout)
        for record in found:
            if record is None or record["link"] != link:
                continue
            if router.standing(layout):
                # In this order: a flush right after a change of sets waits for the kernel to free them (20 ms), and
                # flows that a late packet makes now are cut again before the address is lent to anybody else.
                with router.inside(layout):
                    net, nft = Netlink(), Nft()
                    nfnetlink.cut_flows(int(record["number"]))
                net.remove_link(link)
                _remove(nft, router.record_elements(record))
                if record["egress"]["names"]:
                    _remove(nft, _named(nft, link))
                nft.close()
                net.close()
            with suppress(FileNotFoundError):
                os.unlink(layout.record(str(record["address"])))


def _remove(nft: Nft, items: list[ruleset.Element]) -> None:
    """Removes what is there of the elements: all at once, or one by one when a crash or somebody took some away."""
    try:
        nft.run(ruleset.remove(items))
    except NoSuchTable:
        for item in items:
            with suppress(NoSuchTable):
                nft.run(ruleset.remove([item]))


def change(config: Config, record: router.Json, egress: Egress) -> None:
    """Gives a live dyno another egress, and cuts its flows: whatever the new one denies does not live on."""
    layout = Layout(config)
    place = layout.place(int(record["number"]))
    link, port = str(record["link"]), int(record["port"])
    items = ruleset.elements(link, place, egress, Traffic(**record["traffic"]), port)
    with router.locked(layout):
        now = router.read_record(layout.record(place.address))
        if now is None or now["id"] != record["id"]:
            raise NotFound(f"{record['name']} has ended.", hint="sandbox ps lists the dynos.")
        draft = f"{layout.records}/.{link}"
        with open(draft, "w", encoding="utf-8") as file:
            json.dump({**now, "egress": egress.document(), "elements": items}, file)
        # First: names are judged by it from here on.
        os.rename(draft, layout.record(place.address))
        with router.inside(layout):
            nft = Nft()
            gone = [*router.record_elements(now), *_named(nft, link)]
            try:
                nft.run(ruleset.remove(gone) + ruleset.add(items))
            except NoSuchTable:  # somebody took elements away: the wall was closed for them
                _remove(nft, gone)
                nft.run(ruleset.add(items))
            nfnetlink.cut_flows(place.number)
            nft.close()


def _named(nft: Nft, link: str) -> list[ruleset.Element]:
    """What names opened for that dyno."""
    found = []
    for item in nft.listing(f"set {ruleset.TABLE} named4"):
        for (owner, address), _ in elements(item):
            if owner == link:
                found.append(ruleset.Element("named4", f'"{link}" . {IPv4Address(address)}'))
    return found
