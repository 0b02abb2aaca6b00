"""The resident part of the network wall: one process per instance, which no dyno's life depends on.

It answers names (see ``names``), turns the kernel's log of denied packets into lines, watches the rules on both
sides of the router and puts back what somebody took away. When it dies, everything stays denied, names stop, and the
next command starts it again. It ends by itself a while after the last dyno has left, and takes the router with it.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import os
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

from sandbox import config as configs
from sandbox import hostcmd
from sandbox.config import Config
from sandbox.errors import HostError, SandboxError
from sandbox.firewall import names, router
from sandbox.firewall.layout import LOG_GROUP, Layout
from sandbox.host import netlink, nfnetlink, observe
from sandbox.host.netlink import Netlink
from sandbox.host.nfnetlink import LoggedPacket
from sandbox.host.nft import Nft
from sandbox.policy.egress import RESOLVER, Denied, Reason
from sandbox.units import escape

_POLL_S = 1.0
_SETTLE_S = 0.02
PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 33: "dccp", 47: "gre", 58: "icmpv6", 132: "sctp", 136: "udplite"}


def start(config: Config) -> None:
    """Starts the guard unless it lives, and returns when it answers names. Raises HostError."""
    layout = Layout(config)
    # Who starts one holds the lock until it answers: a guard that is seen here is ready.
    with router.locked(layout, shared=True):
        if router.guarded(layout):
            return
    hostcmd.require("dnsmasq", "dnsmasq-base")
    with router.locked(layout):
        if not router.guarded(layout):
            _spawn(config, layout)


def _spawn(config: Config, layout: Layout) -> None:
    read_end, write_end = os.pipe()
    try:
        hostcmd.spawn(
            [
                *(sys.executable, "-P", "-m", "sandbox.firewall.guard", "--state-dir", config.state_dir),
                *("--run-dir", config.run_dir, "--ready", str(write_end)),
            ],
            log=f"{layout.folder}/guard.log",
            keep=(write_end,),
            env={**hostcmd.ENVIRONMENT, **_passed_on(config)},
        )
        os.close(write_end)
        write_end = -1
        if os.read(read_end, 1) != b"+":
            raise HostError(
                "the firewall's guard ended before it was ready: " + _last_line(f"{layout.folder}/guard.log"),
                hint="sandbox doctor",
            )
    finally:
        os.close(read_end)
        if write_end >= 0:
            os.close(write_end)


def _passed_on(config: Config) -> dict[str, str]:
    """The network of the instance, whoever starts the guard."""
    found = {"SANDBOX_POOL": config.pool}
    if "SANDBOX_CONFIG" in os.environ:
        found["SANDBOX_CONFIG"] = os.environ["SANDBOX_CONFIG"]
    # The package is found the way this process found it.
    found["PYTHONPATH"] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    return found


def _last_line(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = file.read().strip().splitlines()
    return escape(lines[-1]) if lines else "it said nothing."


def stop(layout: Layout) -> None:
    """Ends the guard, if it lives, and waits for its end."""
    try:
        with open(f"{layout.folder}/guard.lock", encoding="ascii") as file:
            pid = int(file.read() or 0)
        pidfd = os.pidfd_open(pid) if pid and router.guarded(layout) else -1
    except (FileNotFoundError, ProcessLookupError):
        return
    if pidfd < 0:
        return
    # The lock says that it lives, so the pid is still its own.
    signal.pidfd_send_signal(pidfd, signal.SIGTERM)
    deadline = time.monotonic() + 5.0
    while router.guarded(layout):
        if time.monotonic() > deadline:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        time.sleep(0.005)
    os.close(pidfd)


class Guard:
    """The process. Its main thread stays in the host's network namespace."""

    def __init__(self, config: Config, lock: int) -> None:
        self._config, self._layout, self._lock = config, Layout(config), lock
        self._nft_events = nfnetlink.open_events()
        self._routing = [netlink.open_events(netlink.RULES | netlink.ADDRESSES | netlink.ROUTES)]
        with router.inside(self._layout):
            self._inner_events = nfnetlink.open_events()
            self._routing.append(netlink.open_events(netlink.RULES))
            self._log = nfnetlink.open_log(LOG_GROUP)
            self._inner, nft = Netlink(), Nft()
            kinds = (socket.SOCK_DGRAM, socket.SOCK_STREAM)
            sockets = {name: {kind: names.bind(kind, *where) for kind in kinds} for name, where in names.PORTS.items()}
        self._dynos: dict[int, router.Json] = {}
        self._denied_at, self._denied = 0.0, ()  # type: float, tuple[Denied, ...]
        self._policy = names.Policy(self._layout, nft, self._ranges, lambda: router.inside(self._layout))
        answers = {"relay": names.relay, "policy": self._policy.answer}
        self._servers = [names.Server(name, sockets[name], answer) for name, answer in answers.items()]
        self._dnsmasq: asyncio.subprocess.Process | None = None
        self._changed: asyncio.Event = asyncio.Event()
        self._who, self._since, self._retry = "", 0.0, False
        self._empty_since = time.monotonic()
        self._ended = asyncio.Event()

    def _ranges(self) -> tuple[Denied, ...]:
        """What is always denied here; the host's addresses among it, looked up once a second."""
        now = time.monotonic()
        if now - self._denied_at > _POLL_S:
            self._denied, self._denied_at = router.denied_now(self._layout), now
        return self._denied

    async def run(self, ready: int) -> None:
        """Until SIGTERM, or until nobody has needed the router for a minute."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end)
        for server in self._servers:
            await server.start()
        loop.add_reader(self._log, self._on_log)
        loop.add_reader(self._nft_events, self._on_rules, self._nft_events)
        loop.add_reader(self._inner_events, self._on_rules, self._inner_events)
        for link in self._routing:
            loop.add_reader(link, self._on_routing, link)
        resolver = asyncio.ensure_future(self._keep_dnsmasq())
        await self._until_answering()
        os.write(ready, b"+")
        os.close(ready)
        try:
            while not self._ended.is_set() and not resolver.done():
                with suppress(TimeoutError):
                    async with asyncio.timeout(_POLL_S):
                        await self._changed.wait()
                if self._ended.is_set():
                    break
                # The message that names who did it comes last, and one look serves many changes.
                await asyncio.sleep(_SETTLE_S)
                self._look()
        finally:
            resolver.cancel()
            if self._dnsmasq is not None and self._dnsmasq.returncode is None:
                self._dnsmasq.kill()
                await self._dnsmasq.wait()

    def _end(self) -> None:
        """Wakes whoever waits for a change, so that the end does not take as long as a look around."""
        self._ended.set()
        self._changed.set()

    async def _keep_dnsmasq(self) -> None:
        """Runs the resolver as nobody, without a capability, in the router; starts it again when it ends."""
        wrap = [
            *(hostcmd.require("nsenter", "util-linux"), f"--net={self._layout.netns}"),
            *(hostcmd.require("setpriv", "util-linux"), "--reuid=65534", "--regid=65534", "--clear-groups"),
            *("--inh-caps=-all", "--bounding-set=-all", "--no-new-privs", "--pdeathsig=KILL"),
        ]
        program = hostcmd.require("dnsmasq", "dnsmasq-base")
        while True:
            try:
                self._dnsmasq = await asyncio.create_subprocess_exec(
                    *wrap, *names.dnsmasq(program), env=hostcmd.ENVIRONMENT, stdin=asyncio.subprocess.PIPE
                )
                await self._dnsmasq.communicate(names.dnsmasq_config(self._ranges()).encode("ascii"))
                print(f"the resolver ended with status {self._dnsmasq.returncode}; it is started again", flush=True)
            except (OSError, SandboxError) as error:
                print(f"the resolver cannot be started now: {escape(str(error))}", flush=True)
            await asyncio.sleep(0.2)

    async def _until_answering(self) -> None:
        """Dnsmasq answers for ``localhost.`` style names by itself; any answer will do."""
        query = struct.pack(">6H", 1, 0x100, 1, 0, 0, 0) + b"\7version\4bind\0" + struct.pack(">2H", 16, 3)
        for _ in range(200):
            with router.inside(self._layout):
                link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            with link:
                link.setblocking(False)
                link.connect((RESOLVER, 53))
                with suppress(OSError, TimeoutError):
                    link.send(query)
                    async with asyncio.timeout(0.5):
                        await asyncio.get_running_loop().sock_recv(link, 512)
                        return
            await asyncio.sleep(0.01)
        raise HostError("the resolver does not answer.")

    def _on_rules(self, link: socket.socket) -> None:
        """Somebody changed rules, here or in the router. Our own changes of elements look the same: one look tells."""
        for data in _received(link):
            change = nfnetlink.parse_change(data) if data else nfnetlink.Change(rules=True)
            if change.rules:
                self._notice()
            if self._changed.is_set() and not self._who and change.pid not in (0, os.getpid()):
                self._who = f"{escape(change.program)} (pid {change.pid})"

    def _on_routing(self, link: socket.socket) -> None:
        """A routing rule or an address changed. The message has the number of the socket that asked: often a pid."""
        for data in _received(link):
            self._notice()
            pid = int.from_bytes(data[12:16], sys.byteorder)
            if pid and not self._who:
                self._who = f"{_program(pid)} (pid {pid})"

    def _notice(self) -> None:
        """Something changed: the window counts from the first change that nobody has looked at yet."""
        if not self._changed.is_set():
            self._since = time.monotonic()
            self._changed.set()

    def _look(self) -> None:
        """Compares everything with what was made, and puts back what is missing.

        Changes of rules, routes and addresses come as events; only of a sysctl the kernel says nothing.
        """
        noticed = self._changed.is_set()
        self._changed.clear()
        since, who = (self._since, self._who) if noticed else (time.monotonic() - _POLL_S, "")
        self._who = ""
        live = any(name.endswith(".json") for name in os.listdir(self._layout.records))
        try:
            due = noticed or self._retry or (live and router.stopped_forwarding(self._layout))
            self._retry = False
            if due:
                # Not while somebody repairs or changes it: half of that would look like a loss.
                with router.locked(self._layout, shared=True, wait=False):
                    self._follow()
                    wanted = live and router.read_state(self._layout)["forwarding"]
                    found = router.faults(self._layout, forwarding=wanted)
                if found:
                    router.repair(self._config, forwarding=wanted, by=who or "unknown", since=since, follow=True)
                    self._follow()
                if {"router table", "denied ranges"} & set(found):
                    self._policy.forget()
        except BlockingIOError:
            self._changed.set()
            self._since, self._who = since, who
        except (SandboxError, OSError) as error:
            self._retry = True  # with the next poll
            self._record("firewall not repaired", message=escape(str(error)))
        if live:
            self._empty_since = time.monotonic()
        elif time.monotonic() - self._empty_since > self._config.linger_s:
            try:
                self._leave()
            except (SandboxError, OSError) as error:
                self._record("router not removed", message=escape(str(error)))

    def _follow(self) -> None:
        """A command with a newer host configuration may have changed what is denied."""
        self._config = self._config._replace(deny=tuple(router.read_state(self._layout)["deny"]))
        self._layout = Layout(self._config)

    def _leave(self) -> None:
        """Nobody needs the router: it goes, unless a dyno came while we looked."""
        with router.locked(self._layout):
            if not router.records(self._layout):
                os.close(self._lock)  # whoever comes next starts a guard of their own
                router.remove(self._layout)
                self._ended.set()

    def _on_log(self) -> None:
        for data in _received(self._log):  # samples that were lost are in the counters
            for packet in nfnetlink.parse_log(data):
                self._tell(packet)

    def _tell(self, packet: LoggedPacket) -> None:
        """One line in the dyno's own stream, if its supervisor listens, and in the firewall's log."""
        record = self._dynos.get(packet.link)
        if record is None:
            by_link = {item["link"]: item for item in router.records(self._layout)}
            links = self._inner.links()
            self._dynos = {index: by_link[name] for name, (index, _) in links.items() if name in by_link}
            record = self._dynos.get(packet.link)
        if record is None:
            return
        text = f"dyno={record['name']} denied {describe(packet.payload)} rule={rule_of(packet.mark)}"
        # Through a descriptor: the path of a Unix socket has at most 107 bytes.
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            folder = os.open(f"{self._config.dynos_dir}/{record['id']}", os.O_PATH | os.O_CLOEXEC)
            try:
                out.setblocking(False)
                out.sendto(text.encode(), f"/proc/self/fd/{folder}/firewall")
            finally:
                os.close(folder)
        self._record("denied", dyno=record["name"], id=record["id"], message=text)

    def _record(self, event: str, **fields: object) -> None:
        from sandbox.host.eventlog import record

        with suppress(OSError):  # a full disk does not end the guard
            record(self._config, event, **fields)


def rule_of(mark: int) -> str:
    """The word for a mark."""
    try:
        return Reason(mark).rule
    except ValueError:
        return str(mark)


def describe(payload: bytes) -> str:
    """``tcp 10.0.0.5:5432`` from the first bytes of a packet, which an app wrote."""
    if len(payload) >= 20 and payload[0] >> 4 == 4:
        protocol, address, start = payload[9], socket.inet_ntop(socket.AF_INET, payload[16:20]), (payload[0] & 15) * 4
    elif len(payload) >= 40 and payload[0] >> 4 == 6:
        protocol, address, start = payload[6], f"[{socket.inet_ntop(socket.AF_INET6, payload[24:40])}]", 40
    else:
        return "something that is no packet"
    name = PROTOCOLS.get(protocol, str(protocol))
    port = payload[start + 2 : start + 4] if protocol in (6, 17, 132, 136) else b""
    return f"{name} {address}" + (f":{int.from_bytes(port)}" if len(port) == 2 else "")


def _received(link: socket.socket) -> Iterator[bytes]:
    """What waits on a socket, datagram by datagram; an empty one where the kernel had to drop some."""
    while True:
        try:
            yield link.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError:
            yield b""


def _program(pid: int) -> str:
    """The name of a process that may be gone already."""
    try:
        return escape(observe.name(pid))
    except SandboxError:
        return "a process that has ended"


def main() -> None:
    """The process that ``start`` makes."""
    parser = argparse.ArgumentParser()
    for option in ("--state-dir", "--run-dir"):
        parser.add_argument(option, required=True)
    parser.add_argument("--ready", type=int, required=True)
    options = parser.parse_args()
    # nftables' library waits with select(2): a descriptor beyond 1,024 would end us, a refused one does not.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))
    config = configs.load(state_dir=options.state_dir, run_dir=options.run_dir)
    layout = Layout(config)
    lock = os.open(f"{layout.folder}/guard.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return  # another one was faster
    os.ftruncate(lock, 0)
    os.write(lock, str(os.getpid()).encode())
    asyncio.run(Guard(config, lock).run(options.ready))


if __name__ == "__main__":
    main()
