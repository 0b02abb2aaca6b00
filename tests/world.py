"""A small world of network namespaces: a host, a network beyond it, and listeners that see what arrives.

No link of it leads out of this machine. ``host`` is where the product runs: it has addresses, a default route and
nothing else. ``outside`` holds every decoy: addresses that the policy counts as public, a 10.0.0.0/8 host, a metadata
service, IPv6 twins, a name server. A listener counts what it saw, so "blocked" can mean "nobody saw it".
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import os
import selectors
import socket
import struct
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

PUBLIC, PUBLIC2, PRIVATE, METADATA = "93.184.216.34", "93.184.216.35", "10.1.2.3", "169.254.169.254"
SHARED, CARRIER, RESERVED, OPERATOR = "192.168.88.1", "100.64.0.9", "198.18.5.5", "93.184.217.9"
DECOYS = (
    PUBLIC,
    PUBLIC2,
    PRIVATE,
    METADATA,
    SHARED,
    CARRIER,
    RESERVED,
    OPERATOR,
    "172.31.9.9",
    "240.1.2.3",
    "168.63.129.16",
)
PUBLIC6, ULA6 = "2606:2800:220:1::1", "fd00:ec2::254"
HOST, HOST_PUBLIC, HOST6 = "192.168.77.2", "81.2.69.142", "fd00:77::2"
GATEWAY, GATEWAY6 = "192.168.77.1", "fd00:77::1"
_libc = ctypes.CDLL(None, use_errno=True)


def ip(*words: str, netns: str = "") -> None:
    subprocess.run(["ip", *(["-n", netns] if netns else []), *words], check=True, capture_output=True)


class Namespace:
    """A network namespace under a path of our own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()
        holder = subprocess.Popen(
            ["unshare", "-n", "sh", "-c", "echo; read x"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        holder.stdout.readline()
        subprocess.run(["mount", "--bind", f"/proc/{holder.pid}/ns/net", str(path)], check=True)
        holder.communicate(b"\n")
        self.run("ip", "link", "set", "lo", "up")

    def argv(self, *words: str) -> list[str]:
        return ["nsenter", f"--net={self.path}", *words]

    def run(self, *words: str, stdin: str = "", check: bool = True) -> str:
        done = subprocess.run(self.argv(*words), input=stdin, capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, (words, done.stderr)
        return done.stdout

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """The calling thread is in the namespace."""
        home, there = (os.open(p, os.O_RDONLY) for p in ("/proc/thread-self/ns/net", str(self.path)))
        try:
            assert _libc.setns(there, 0x40000000) == 0
            yield
        finally:
            assert _libc.setns(home, 0x40000000) == 0
            os.close(home)
            os.close(there)

    def socket(self, kind: socket.SocketKind, address: str, port: int) -> socket.socket:
        with self.entered():
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            link = socket.socket(family, kind)
            link.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            link.bind((address, port))
            if kind is socket.SOCK_STREAM:
                link.listen(512)
            link.setblocking(False)
            return link

    def close(self) -> None:
        subprocess.run(["umount", "-l", str(self.path)], check=False)


class Own(Namespace):
    """The network namespace that we are in."""

    def __init__(self) -> None:
        self.path = Path(f"/proc/{os.getpid()}/ns/net")

    def close(self) -> None:
        """It outlives the tests; its links ended with their peers."""


class Listeners:
    """Answers every connection and datagram with a line, and remembers who came: {(protocol, port): sources}."""

    def __init__(self) -> None:
        self.seen: dict[str, list[str]] = {}
        self._selector = selectors.DefaultSelector()
        self._wake, wake = os.pipe()
        self._wake_end = wake
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def add(self, where: Namespace, address: str, port: int, *kinds: str) -> None:
        for kind in kinds or ("tcp", "udp"):
            link = where.socket(socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM, address, port)
            with self._lock:
                self._selector.register(link, selectors.EVENT_READ, (kind, f"{kind} {address}:{port}"))
        os.write(self._wake_end, b"x")

    def _loop(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj == self._wake:
                    os.read(self._wake, 100)
                    continue
                kind, name = key.data
                with contextlib.suppress(OSError):
                    if kind == "tcp":
                        link, source = key.fileobj.accept()
                        self._saw(name, source[0])
                        link.setblocking(False)
                        link.send(b"hello\n")
                        with self._lock:
                            self._selector.register(link, selectors.EVENT_READ, ("flow", f"flow {name}"))
                    elif kind == "flow":
                        data = key.fileobj.recv(65536)
                        if not data:
                            self._selector.unregister(key.fileobj)
                            key.fileobj.close()
                        else:
                            self._saw(name, data.decode("utf-8", "replace"))
                            key.fileobj.send(b"again\n")
                    else:
                        data, source = key.fileobj.recvfrom(65536)
                        self._saw(name, source[0])
                        key.fileobj.sendto(b"hello\n", source)

    def _saw(self, name: str, what: str) -> None:
        self.seen.setdefault(name, []).append(what)

    def count(self, name: str) -> int:
        return len(self.seen.get(name, []))

    def counts(self) -> Counter[str]:
        return Counter({name: len(values) for name, values in self.seen.items()})


class NameServer:
    """A name server of the outside. ``zone``: name → addresses, or a function of how often it was asked; (…, ttl).

    A name it does not know is looked up for real, and whoever connects to the address it gives is passed on to the
    real one: package tools reach their index through the world, and through the wall.
    """

    def __init__(self, world: World) -> None:
        self.world, self.asked, self.ttl = world, [], 60
        self.zone: dict[str, object] = {}
        self._relayed: dict[str, str] = {}
        for address in resolvers():
            where = world.host if address.startswith("127.") else world.outside
            if where is world.outside:
                where.run("ip", "address", "add", f"{address}/32", "dev", "lo", check=False)
            self.serve(where, address)

    def serve(self, where: Namespace, address: str) -> None:
        datagrams, stream = where.socket(socket.SOCK_DGRAM, address, 53), where.socket(socket.SOCK_STREAM, address, 53)
        datagrams.setblocking(True)
        stream.setblocking(True)
        threading.Thread(target=self._datagrams, args=(datagrams,), daemon=True).start()
        threading.Thread(target=self._stream, args=(stream,), daemon=True).start()

    def _datagrams(self, link: socket.socket) -> None:
        while True:
            query, sender = link.recvfrom(4096)
            with contextlib.suppress(Exception):
                answer = self.answer(query)
                if len(answer) > 512:
                    answer = (
                        answer[:2] + bytes([answer[2] | 2]) + answer[3:6] + bytes(6) + answer[12 : _question_end(query)]
                    )
                link.sendto(answer, sender)

    def _stream(self, listener: socket.socket) -> None:
        while True:
            link, _ = listener.accept()
            with contextlib.suppress(Exception), link:
                length = int.from_bytes(link.recv(2))
                answer = self.answer(link.recv(length))
                link.sendall(len(answer).to_bytes(2) + answer)

    def answer(self, query: bytes) -> bytes:
        end = _question_end(query)
        labels, position = [], 12
        while query[position]:
            labels.append(query[position + 1 : position + 1 + query[position]].decode().lower())
            position += 1 + query[position]
        kind = struct.unpack_from(">H", query, end - 4)[0]
        name = ".".join(labels)
        self.asked.append(name)
        found, ttl = self._look_up(name)
        wanted = [a for a in found if (kind == 1 and ":" not in a) or (kind == 28 and ":" in a)]
        records = b"".join(
            struct.pack(">HHHIH", 0xC00C, kind, 1, ttl, 4 if kind == 1 else 16) + ipaddress.ip_address(a).packed
            for a in wanted
        )
        code = 0 if found else 3
        return query[:2] + struct.pack(">HHHHH", 0x8180 | code, 1, len(wanted), 0, 0) + query[12:end] + records

    def _look_up(self, name: str) -> tuple[list[str], int]:
        entry = self.zone.get(name)
        if callable(entry):
            entry = entry(self.asked.count(name))
        if isinstance(entry, tuple):
            return list(entry[0]), entry[1]
        if entry is not None:
            return list(entry), self.ttl
        if name in self._relayed:
            return [self._relayed[name]], 60
        if not name.endswith((".example", ".test", ".invalid", ".arpa")) and "." in name:
            with contextlib.suppress(OSError):
                real = socket.getaddrinfo(name, 443, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
                address = f"20.7.7.{len(self._relayed) + 1}"
                self.world.outside.run("ip", "address", "add", f"{address}/32", "dev", "lo")
                for port in (80, 443):
                    relay(self.world.outside, address, port, real)
                self._relayed[name] = address
                return [address], 60
        return [], 60


def _question_end(query: bytes) -> int:
    position = 12
    while query[position]:
        position += 1 + query[position]
    return position + 5


def resolvers() -> list[str]:
    """The host's own, as the product reads them: the world answers in their place."""
    words = (line.split() for line in Path("/etc/resolv.conf").read_text().splitlines())
    return [line[1] for line in words if len(line) > 1 and line[0] == "nameserver" and ":" not in line[1]][:3]


def relay(where: Namespace, address: str, port: int, real: str) -> None:
    """Passes connections on to the package index that this machine really has."""
    listener = where.socket(socket.SOCK_STREAM, address, port)
    listener.setblocking(True)

    def pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def pair(link: socket.socket) -> None:
        with contextlib.suppress(OSError), link, socket.create_connection((real, port), timeout=30) as other:
            other.settimeout(None)
            back = threading.Thread(target=pump, args=(other, link), daemon=True)
            back.start()
            pump(link, other)
            back.join()

    def serve() -> None:
        while True:
            threading.Thread(target=pair, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()


class World:
    """The two namespaces, the link between them, and everything that listens."""

    current: World

    def __init__(self, base: Path, *, own: bool = False) -> None:
        """``own``: the host is the caller's own network namespace. Only for a machine that is there for the tests."""
        World.current = self
        self.on_close: list[Callable[[], None]] = []
        base.mkdir(exist_ok=True)
        self.host = Own() if own else Namespace(base / "host")
        self.outside = Namespace(base / "outside")
        self.host.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "lan0", "netns", str(os.getpid()))
        ip("link", "set", "lan0", "netns", str(self.outside.path))
        for where, device, addresses in (
            (self.host, "eth0", (f"{HOST}/24", f"{HOST_PUBLIC}/32", f"{HOST6}/64")),
            (self.outside, "lan0", (f"{GATEWAY}/24", f"{GATEWAY6}/64")),
        ):
            where.run("ip", "link", "set", device, "up")
            for address in addresses:
                # nodad: a fresh IPv6 address is otherwise no address for two seconds.
                where.run("ip", "address", "add", address, "dev", device, *(["nodad"] if ":" in address else []))
        for address in DECOYS:
            self.outside.run("ip", "address", "add", f"{address}/32", "dev", "lo")
        for address in (PUBLIC6, ULA6):
            self.outside.run("ip", "address", "add", f"{address}/128", "dev", "lo", "nodad")
        self.host.run("ip", "route", "add", "default", "via", GATEWAY)
        self.host.run("ip", "-6", "route", "add", "default", "via", GATEWAY6)
        # For the controls: with the product's address translation gone, the outside still knows the way back.
        self.outside.run("ip", "route", "add", "172.16.0.0/12", "via", HOST)
        for name in ("all", "default", "lan0", "lo"):
            self.outside.run("sysctl", "-qw", f"net.ipv4.conf.{name}.rp_filter=0")
        self.listeners = Listeners()
        self.names = NameServer(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for action in self.on_close:
            action()
        self.host.close()
        self.outside.close()
