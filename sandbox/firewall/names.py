"""Answers the dynos' questions: who may ask what, and which addresses an answer opens for how long.

    dyno with mode public ─────────────► dnsmasq (router, 172.16.0.23:53) ─► relay (127.0.0.1:5353)
    dyno with a list ─► Policy (router, 172.16.0.23:5300) ─► dnsmasq                     │
                                                                host's own resolver ◄────┘

dnsmasq has no private answers and no IPv6 ones. The relay's sockets live in two namespaces, so the host's resolver
can be anything, 127.0.0.53 included, and nothing of ours listens on the host.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractContextManager, suppress

from sandbox.firewall import dns, router, ruleset
from sandbox.firewall.layout import POLICY_PORT, RELAY_PORT, Layout
from sandbox.firewall.router import Json, read_record
from sandbox.host.nft import Nft, NftError
from sandbox.policy import egress
from sandbox.policy.egress import RESOLVER, Denied

_TIMEOUT_S = 2.0  # for one server; the second one gets as long
_MOST_SERVERS = 2
# Every question holds a descriptor, and nftables' library knows the first 1,024: the sum stays well below. A dyno may
# ask 50 times a second, so even one that asks for names that nobody answers leaves room for others.
_MOST_IN_FLIGHT = {"relay": 400, "policy": 150}
_MOST_OF_ONE = {"relay": 400, "policy": 30}
_MOST_CONNECTIONS, _MOST_CONNECTIONS_OF_ONE = 40, 4
# An app connects a moment after it was told an address. Longer than an hour is nobody's need.
GRACE_S, LONGEST_S = 2, 3600
_MOST_OPEN = 1000  # addresses that names may open for one dyno: the set is shared
Answer = Callable[[bytes, str], Awaitable[bytes | None]]
Enter = Callable[[], AbstractContextManager[None]]


def bind(kind: socket.SocketKind, address: str, port: int) -> socket.socket:
    """A socket of the caller's network namespace that waits for nobody."""
    link = socket.socket(socket.AF_INET, kind | socket.SOCK_CLOEXEC)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    link.bind((address, port))
    link.setblocking(False)
    if kind is socket.SOCK_STREAM:
        link.listen(64)
    return link


def host_resolvers(path: str = "/etc/resolv.conf") -> list[str]:
    """The host's own name servers, read again for every question: they change with networks and VPNs."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            words = [line.split() for line in file]
    except OSError:
        return []
    return [line[1].partition("%")[0] for line in words if len(line) > 1 and line[0] == "nameserver"][:_MOST_SERVERS]


class Server:
    """Answers one address, datagrams and connections alike, a bounded number at a time."""

    def __init__(self, name: str, sockets: dict[socket.SocketKind, socket.socket], answer: Answer) -> None:
        self._most, self._most_of_one = _MOST_IN_FLIGHT[name], _MOST_OF_ONE[name]
        self._connections_of_one = _MOST_CONNECTIONS if name == "relay" else _MOST_CONNECTIONS_OF_ONE
        self._datagrams, self._stream = sockets[socket.SOCK_DGRAM], sockets[socket.SOCK_STREAM]
        self._answer = answer
        self._tasks: set[asyncio.Task[None]] = set()
        self._asking: Counter[str] = Counter()
        self._connected: Counter[str] = Counter()

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(self._datagrams, self._receive)
        await asyncio.start_server(self._connection, sock=self._stream)

    def _receive(self) -> None:
        for _ in range(64):
            try:
                query, sender = self._datagrams.recvfrom(4096)
            except (BlockingIOError, ConnectionError):
                return
            if len(self._tasks) < self._most and self._asking[sender[0]] < self._most_of_one:
                self._asking[sender[0]] += 1
                task = asyncio.ensure_future(self._one(query, sender))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _one(self, query: bytes, sender: tuple[str, int]) -> None:
        with suppress(OSError, ValueError, TimeoutError):
            answer = await self._answer(query, sender[0])
            if answer is not None:
                self._datagrams.sendto(_fitting(query, answer), sender)
        self._asking[sender[0]] -= 1
        if not self._asking[sender[0]]:
            del self._asking[sender[0]]

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sender = str(writer.get_extra_info("peername")[0])
        self._connected[sender] += 1
        try:
            if self._connected.total() > _MOST_CONNECTIONS or self._connected[sender] > self._connections_of_one:
                return
            async with asyncio.timeout(3 * _TIMEOUT_S):
                while True:
                    query = await reader.readexactly(int.from_bytes(await reader.readexactly(2)))
                    answer = await self._answer(query, sender)
                    if answer is None:
                        return
                    writer.write(len(answer).to_bytes(2) + answer)
                    await writer.drain()
        except (OSError, ValueError, TimeoutError, asyncio.IncompleteReadError):
            return
        finally:
            # close() alone waits for ever on a reader that never reads; and it counts for as long as it is there.
            writer.close()
            with suppress(OSError, TimeoutError):
                async with asyncio.timeout(_TIMEOUT_S):
                    await writer.wait_closed()
            writer.transport.abort()
            self._connected[sender] -= 1
            if not self._connected[sender]:
                del self._connected[sender]


def _fitting(query: bytes, answer: bytes) -> bytes:
    """The answer, or its head with the truncation bit: then the asker comes back by TCP. 1232: DNS Flag Day 2020."""
    most = 1232 if query[11:12] == b"\1" else 512
    if len(answer) <= most:
        return answer
    with suppress(ValueError):
        asked = dns.question(query)
        cut = dns.reply(query, asked, dns.NOERROR)
        return cut[:2] + bytes([cut[2] | 2]) + cut[3:]
    return answer[:most]


async def ask(server: str, port: int, query: bytes) -> bytes:
    """One question to one server: by datagram from a port nobody can guess, by TCP when the answer is cut short."""
    loop = asyncio.get_running_loop()
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as link:
        link.setblocking(False)
        await loop.sock_connect(link, (server, port))
        await loop.sock_sendall(link, query)
        async with asyncio.timeout(_TIMEOUT_S):
            while True:
                answer = await loop.sock_recv(link, 65536)
                if answer[:2] == query[:2] and len(answer) >= 12:
                    break
    if not answer[2] & 2:
        return answer
    async with asyncio.timeout(_TIMEOUT_S):
        reader, writer = await asyncio.open_connection(server, port)
        try:
            writer.write(struct.pack(">H", len(query)) + query)
            return await reader.readexactly(int.from_bytes(await reader.readexactly(2)))
        finally:
            writer.close()


async def relay(query: bytes, _: str) -> bytes | None:
    """Dnsmasq's question to the host's own resolvers, in turn."""
    dns.question(query)
    for server in host_resolvers():
        with suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
            return await ask(server, 53, query)
    return dns.reply(query, dns.question(query), dns.SERVFAIL)


class Policy:
    """Answers dynos that have a list: names on it, and nothing else."""

    def __init__(self, layout: Layout, nft: Nft, denied: Callable[[], tuple[Denied, ...]], enter: Enter) -> None:
        self._layout, self._nft, self._denied, self._enter = layout, nft, denied, enter
        self._open: dict[tuple[str, str], float] = {}
        self._records: dict[str, tuple[int, Json]] = {}

    def _record(self, sender: str) -> Json | None:
        """Whose address that is; the table has made sure that nobody else can send from it."""
        path = self._layout.record(sender)
        try:
            changed = os.stat(path).st_mtime_ns
        except FileNotFoundError:
            return None
        known = self._records.get(sender)
        if known is None or known[0] != changed:
            record = read_record(path)
            if record is None:
                return None
            known = self._records[sender] = (changed, record)
            # Another dyno, or another policy: what names opened before is closed again.
            self._open = {key: until for key, until in self._open.items() if key[0] != record["link"]}
        return known[1]

    async def answer(self, query: bytes, sender: str) -> bytes | None:
        """The answer for that dyno; None for what is not even a question."""
        asked = dns.question(query)
        record = self._record(sender)
        wishes = record["egress"] if record else {"pinned": []}
        pinned = tuple(dns.Address(address, 60) for name, address in wishes["pinned"] if name == asked.name)
        if pinned:
            return dns.reply(query, asked, dns.NOERROR, answers=pinned if asked.type == dns.A else ())
        listed = record is not None and (wishes["mode"] == "public" or egress.name_allowed(asked.name, wishes["names"]))
        if record is None or not listed:
            # Not asked of anybody: a question is a message to whoever owns the name.
            return dns.reply(query, asked, dns.REFUSED)
        if asked.type == dns.AAAA:
            return dns.reply(query, asked, dns.NOERROR)
        answer = await self._ask_dnsmasq(query)
        found = dns.addresses(answer)
        for _ in range(100):
            try:
                # Under the lock that a change of policy takes: the answer may have taken seconds.
                with router.locked(self._layout, shared=True, wait=False):
                    now = self._record(sender)
                    if now is None or (now["id"], now["egress"]) != (record["id"], wishes):
                        return dns.reply(query, asked, dns.REFUSED)
                    if wishes["mode"] == "allow":
                        self._admit(record, found)
                    return answer
            except BlockingIOError:
                await asyncio.sleep(0.02)
            except (NftError, OverflowError):
                break  # a set that is full: better no name than a wrong one
        return dns.reply(query, asked, dns.SERVFAIL)

    async def _ask_dnsmasq(self, query: bytes) -> bytes:
        with self._enter():
            link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        loop = asyncio.get_running_loop()
        with link:
            link.setblocking(False)
            await loop.sock_connect(link, (RESOLVER, 53))
            await loop.sock_sendall(link, query)
            async with asyncio.timeout(_MOST_SERVERS * _TIMEOUT_S + 1):
                return await loop.sock_recv(link, 65536)

    def _admit(self, record: Json, found: list[dns.Address]) -> None:
        """Opens the addresses for that dyno, each as long as its answer may be used, and never for less than before."""
        now, text, denied = time.monotonic(), "", self._denied()
        mine = sum(1 for (link, _), until in self._open.items() if link == record["link"] and until > now)
        if mine + len(found) > _MOST_OPEN:
            raise OverflowError("too many addresses are open for this dyno")
        for item in found:
            if egress.reason_of(item.address, denied) is not None:
                continue  # denied whatever the name; the table would drop it all the same
            seconds = min(item.ttl, LONGEST_S) + GRACE_S
            key = (str(record["link"]), item.address)
            if self._open.get(key, 0.0) >= now + seconds:
                continue
            self._open[key] = now + seconds
            element = ruleset.Element("named4", f'"{key[0]}" . {item.address}', f"timeout {seconds}s")
            # A kernel before 6.12 does not prolong an element that is there.
            text += ruleset.replace(element)
        if text:
            self._nft.run(text)
        if len(self._open) > 10_000:
            self._open = {key: until for key, until in self._open.items() if until > now}

    def forget(self) -> None:
        """The table was made anew: nothing is open any more."""
        self._open.clear()


def dnsmasq(program: str) -> list[str]:
    """Dnsmasq's command line: no file of the host, and its configuration from a pipe."""
    return [program, "--keep-in-foreground", "--conf-file=-"]


def dnsmasq_config(denied: Iterable[Denied]) -> str:
    """What dnsmasq reads on its input: no file of the host, and no answer that points at anything local.

    ``stop-dns-rebind`` knows the classic private ranges; ``bogus-nxdomain`` gets the rest of ours.
    """
    lines = [
        *("no-hosts", "no-resolv", "no-poll", "pid-file", "user=", "group=", "bind-interfaces", "domain-needed"),
        *("bogus-priv", "stop-dns-rebind", "filter-AAAA", "cache-size=2000", "dns-forward-max=400"),
        # It would write a line of the app's choosing to the host's log for every private answer.
        "log-facility=/dev/null",
        *("edns-packet-max=1232", f"max-ttl={LONGEST_S}", f"listen-address={RESOLVER}"),
        f"server=127.0.0.1#{RELAY_PORT}",
        *(f"bogus-nxdomain={network}" for network in egress.prefixes(denied)),
    ]
    return "\n".join(lines) + "\n"


PORTS = {"relay": ("127.0.0.1", RELAY_PORT), "policy": (RESOLVER, POLICY_PORT)}
