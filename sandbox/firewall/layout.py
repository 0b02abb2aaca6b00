"""Where the network of one instance lives: names, addresses and paths, all derived from the configuration."""

from __future__ import annotations

import os
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import NamedTuple

from sandbox.config import Config
from sandbox.errors import HostError
from sandbox.policy.egress import RESOLVER

GROUP = 91  # of every dyno's link in the router: one rule covers them all
MARK = 0x5B  # of a packet that passed the table; only marked packets are routed
TABLE = 91  # the router's only table with routes in it
LOG_GROUP = 5
RULE_PRIORITY = 9100
UPLINK = "uplink"  # the router's end of the link to the host
POLICY_PORT = 5300  # where the resolver answers dynos that have a list
RELAY_PORT = 5353  # on the router's loopback: the way to the host's resolver
# Links have two ends and nobody else; locally administered addresses.
ROUTER_MAC, OTHER_MAC = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")


class Place(NamedTuple):
    """One /30: ``gateway`` is the router's end, ``address`` the dyno's. ``number`` counts from 1."""

    number: int
    gateway: IPv4Address
    address: IPv4Address

    @property
    def interface(self) -> IPv4Interface:
        return IPv4Interface(f"{self.address}/30")


class Layout(NamedTuple):
    """The network of one instance."""

    config: Config

    @property
    def folder(self) -> str:
        return f"{self.config.run_dir}/net"

    def make_folders(self) -> None:
        """Creates what is missing, for root alone."""
        for path in (self.folder, self.records):
            os.makedirs(path, mode=0o700, exist_ok=True)

    @property
    def netns(self) -> str:
        return f"{self.folder}/router"

    @property
    def records(self) -> str:
        return f"{self.folder}/dynos"

    @property
    def state(self) -> str:
        return f"{self.folder}/state.json"

    @property
    def dirty(self) -> str:
        """There while a repair is due or under way."""
        return f"{self.folder}/dirty"

    @property
    def host_link(self) -> str:
        """The host's end of the link to the router."""
        return f"sbx-{self.config.host}"

    @property
    def host_table(self) -> str:
        return f"sandbox_{self.config.host}"

    @property
    def route_table(self) -> int:
        """The host's routing table with the way to the dynos: above all numbers that people choose."""
        return 0x5B000000 | int(self.config.host[:6], 16)

    @property
    def metric(self) -> int:
        """Of our route in the host's main table: another instance's for the same pool is another route."""
        return 0x5B0000 | int(self.config.host[:4], 16)

    @property
    def pool(self) -> IPv4Network:
        return IPv4Network(self.config.pool)

    @property
    def host_address(self) -> IPv4Address:
        """The address from which the host asks dynos, and the only one that gets an answer."""
        return self.pool.network_address + 1

    @property
    def router_address(self) -> IPv4Address:
        """The address that all dynos have on the host."""
        return self.pool.network_address + 2

    @property
    def places(self) -> int:
        """How many dynos the pool has room for."""
        return self.pool.num_addresses // 4 - 1 - int(IPv4Address(RESOLVER) in self.pool)

    def place(self, number: int) -> Place:
        """The /30 of that number, 1 to the number of /30s; HostError for the resolver's own."""
        base = self.pool.network_address + 4 * number
        if base == IPv4Address(int(IPv4Address(RESOLVER)) & ~3):
            raise HostError(f"{base}/30 is the resolver's.")
        return Place(number, base + 1, base + 2)

    def numbers(self) -> range:
        return range(1, self.pool.num_addresses // 4)

    def record(self, address: IPv4Address | str) -> str:
        return f"{self.records}/{address}.json"


def link_name(container_id: str) -> str:
    """The router's end of a dyno's link: 12 characters, an interface name may have 15."""
    return f"sbx-{container_id.rsplit('-', 1)[1]}"
