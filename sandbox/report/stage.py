"""The stage on which a twin acts: a network of namespaces that plays the host, a neighbour and the world outside.

No packet of a probe leaves this machine, and a wall that was weakened on purpose is never the one around customers:
the caller moves into a network namespace of its own, and the twin's router stands in there.
"""

from __future__ import annotations

import os
import selectors
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Interface
from typing import NamedTuple

from sandbox.config import Config
from sandbox.firewall import admit
from sandbox.firewall.layout import OTHER_MAC, ROUTER_MAC, Place
from sandbox.firewall.names import host_resolvers
from sandbox.host import netns
from sandbox.host import syscalls as sys
from sandbox.host.netlink import Netlink
from sandbox.policy.egress import ALWAYS_DENIED, METADATA, Egress, Mode
from sandbox.policy.sizes import Traffic

HOST, OUTSIDE, PUBLIC = "192.168.77.2", "192.168.77.1", "93.184.216.34"
PORTS = (25, 53, 80, 853, 5353)
WAIT_S = 0.2  # answers on this machine take less than one millisecond
_NEIGHBOUR = "sbx-00000000-0e19b0e5"


class Attempt(NamedTuple):
    """Something that is sent, and the rule that should deny it."""

    protocol: str
    address: str
    port: int
    rule: str

    @property
    def what(self) -> str:
        return f"{self.protocol} {self.address}:{self.port}"


class Stage:
    """Built in the caller's network namespace, which the caller made for it; everything goes when the caller ends."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self.seen: Counter[str] = Counter()
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self.path = f"{folder}/outside"
        netns.make(self.path)
        self.outside = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._link()
            for address in self._addresses():
                for port in PORTS:
                    self._listen(self.outside, address, port)
            self._resolvers()
        except BaseException:
            self.close()
            raise
        threading.Thread(target=self._serve, daemon=True).start()

    def _addresses(self) -> list[str]:
        """One of each range that the policy denies, the metadata services, and one of the internet."""
        bases = [text.partition("/")[0] for text, _ in ALWAYS_DENIED if "/" in text and not text.endswith("/32")]
        inner = [str(IPv4Address(base) + 9) for base in bases]
        self._inner = [a for a in inner if not a.startswith(("127.", "0.", "224.", "255.", "240."))]
        return [PUBLIC, *METADATA, *self._inner]

    def decoys(self) -> list[str]:
        """Listening addresses, one in each denied range that an interface can have."""
        return list(self._inner)

    def _link(self) -> None:
        here = Netlink()
        here.up(1)
        here.veth("eth0", ROUTER_MAC, group=0, peer="eth0", peer_mac=OTHER_MAC, peer_netns=self.outside, flags=0)
        index = here.index("eth0")
        here.address(index, IPv4Interface(f"{HOST}/24"))
        here.up(index)
        here.route("192.168.77.0/24", device=index)
        with netns.entered(self.outside):
            there = Netlink()
            for name in ("all", "default", "lo"):
                netns.write_sysctl(f"ipv4/conf/{name}/rp_filter", "0")
        there.up(1)
        other = there.index("eth0")
        there.address(other, IPv4Interface(f"{OUTSIDE}/24"))
        there.up(other)
        there.route("192.168.77.0/24", device=other)
        # Where the address translation is gone, the world would still know the way back.
        there.route("0.0.0.0/0", device=other, via=IPv4Address(HOST))
        here.route("0.0.0.0/0", device=index, via=IPv4Address(OUTSIDE))
        for address in self._addresses():
            there.address(1, IPv4Interface(f"{address}/32"))
        self._there = there
        here.close()

    def _listen(self, where: int | None, address: str, port: int) -> None:
        """A canary for TCP and UDP: answers, and remembers that somebody came."""
        for kind, word in ((socket.SOCK_STREAM, "tcp"), (socket.SOCK_DGRAM, "udp")):
            link = self._socket(where, kind)
            link.bind((address, port))
            if kind is socket.SOCK_STREAM:
                link.listen(64)
            link.setblocking(False)
            with self._lock:
                self._selector.register(link, selectors.EVENT_READ, (word, f"{word} {address}:{port}"))

    def _socket(self, where: int | None, kind: socket.SocketKind) -> socket.socket:
        if where is None:
            link = socket.socket(socket.AF_INET, kind)
        else:
            with netns.entered(where):
                link = socket.socket(socket.AF_INET, kind)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return link

    def canary(self, address: str, port: int, where: int | None = None) -> None:
        """One more listener, on the host itself unless a namespace is given."""
        self._listen(where, address, port)

    def _serve(self) -> None:
        while True:
            with self._lock:
                ready = self._selector.select(0.05)
            for key, _ in ready:
                word, name = key.data
                with suppress(OSError):
                    self._answer(key.fileobj, word, name)  # type: ignore[arg-type]

    def _answer(self, link: socket.socket, word: str, name: str) -> None:
        if word == "udp":
            _, sender = link.recvfrom(2048)
            self.seen[name] += 1
            link.sendto(b"canary\n", sender)
        elif word == "tcp":
            connection, _ = link.accept()
            self.seen[name] += 1
            connection.setblocking(False)
            connection.send(b"canary\n")
            self._selector.register(connection, selectors.EVENT_READ, ("flow", f"flow {name}"))
        elif link.recv(2048):
            self.seen[name] += 1
        else:
            self._selector.unregister(link)
            link.close()

    def _resolvers(self) -> None:
        """Answers in place of the host's own resolvers: one name is public, one private, one changes."""
        self._asked: Counter[str] = Counter()
        for address in host_resolvers()[:3]:
            if ":" in address:
                continue
            local = address.startswith("127.")
            if not local:
                with suppress(OSError):  # one of the decoys may have it
                    self._there.address(1, IPv4Interface(f"{address}/32"))
            link = self._socket(None if local else self.outside, socket.SOCK_DGRAM)
            with suppress(OSError):
                link.bind((address, 53))
                threading.Thread(target=self._resolve, args=(link,), daemon=True).start()

    def _resolve(self, link: socket.socket) -> None:
        while True:
            query, sender = link.recvfrom(2048)
            name, position = "", 12
            while query[position]:
                name += query[position + 1 : position + 1 + query[position]].decode("ascii", "replace") + "."
                position += 1 + query[position]
            self._asked[name] += 1
            inner = name.startswith("private") or (name.startswith("changing") and self._asked[name] > 1)
            address = IPv4Address("169.254.169.254" if inner else PUBLIC).packed
            end = position + 5
            record = struct.pack(">HHHIH", 0xC00C, 1, 1, 1, 4) + address
            a = struct.unpack_from(">H", query, position + 1)[0] == 1
            head = query[:2] + struct.pack(">HHHHH", 0x8180, 1, int(a), 0, 0)
            link.sendto(head + query[12:end] + (record if a else b""), sender)

    def neighbour(self, config: Config) -> Place:
        """Another dyno, as far as the network goes: a namespace with a place, and a listener in it."""
        wish = admit.Wish(_NEIGHBOUR, "neighbour.1", "neighbour", Egress(Mode.PUBLIC), Traffic(1000, 200, 125_000_000))
        place = admit.lease(config, wish)
        path = f"{self._folder}/neighbour"
        netns.make(path)
        admit.connect(config, place, path)
        self.neighbour_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.canary(str(place.address), 80, self.neighbour_fd)
        return place

    def leave(self, config: Config, place: Place) -> None:
        """The neighbour goes."""
        from sandbox.firewall.layout import link_name

        admit.withdraw(config, link_name(_NEIGHBOUR), str(place.address))
        os.close(self.neighbour_fd)
        sys.umount(f"{self._folder}/neighbour", detach=True)
        os.unlink(f"{self._folder}/neighbour")

    def close(self) -> None:
        os.close(self.outside)
        sys.umount(self.path, detach=True)
        os.unlink(self.path)


def send(namespace: str, attempts: Iterable[Attempt], *, wait_s: float = WAIT_S) -> set[str]:
    """Sends from within a network namespace, by a child that is in no other namespace of the dyno; who answered."""
    wanted = list(attempts)

    def action(out: Callable[[bytes], None]) -> None:
        links: dict[socket.socket, str] = {}
        for item in wanted:
            kind = socket.SOCK_STREAM if item.protocol == "tcp" else socket.SOCK_DGRAM
            link = socket.socket(socket.AF_INET, kind)
            link.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            link.setblocking(False)
            with suppress(OSError):
                if item.protocol == "tcp":
                    link.connect_ex((item.address, item.port))
                else:
                    link.sendto(b"probe", (item.address, item.port))
                links[link] = item.what
        until = time.monotonic() + wait_s
        with selectors.DefaultSelector() as waiting:
            for link in links:
                waiting.register(link, selectors.EVENT_READ)
            while (left := until - time.monotonic()) > 0 and links:
                for key, _ in waiting.select(left):
                    chosen = key.fileobj
                    assert isinstance(chosen, socket.socket)  # noqa: S101 - for the type checker
                    waiting.unregister(chosen)
                    name = links.pop(chosen)
                    with suppress(OSError):
                        if chosen.recv(64):
                            out(name.encode() + b"\n")

    return set(inside_network(namespace, action).decode().splitlines())


def _write(fd: int, data: bytes) -> None:
    os.write(fd, data)


def inside_network(namespace: str, action: Callable[[Callable[[bytes], None]], None], *, seconds: int = 20) -> bytes:
    """What a child says that is in that network namespace, and nowhere else, until it ends or the time is up."""
    import signal

    fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:  # pragma: no cover - the child never returns
        try:
            sys.become_child()
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(seconds)
            sys.setns(fd, sys.CLONE_NEWNET)
            action(lambda data: _write(write_end, data))
        finally:
            os._exit(0)
    os.close(fd)
    os.close(write_end)
    said = b""
    while piece := os.read(read_end, 65536):
        said += piece
    os.close(read_end)
    os.waitpid(pid, 0)
    return said
