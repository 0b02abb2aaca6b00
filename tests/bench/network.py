"""The network wall in figures: admission, throughput and connection rate beside Docker's bridge, and what 500 cost.

Everything happens in the world of namespaces that the tests use; both paths end at the same listener, and the same
program sends from a dyno's and from a container's network namespace.
"""

from __future__ import annotations

import fcntl
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from sandbox.config import Config
from sandbox.firewall import admit, guard, router
from sandbox.firewall.layout import Layout, Place, link_name
from sandbox.host import syscalls
from sandbox.policy.egress import Egress
from sandbox.policy.sizes import Traffic
from tests.conftest import Instance
from tests.world import PUBLIC, World

ROUNDS = int(os.environ.get("BENCH_RUNS", "15"))
POPULATIONS = (1, 100, 2000)
# The caps of a size are not what is measured here: the largest class of flows, and rates that nobody reaches.
FREE = Traffic(8000, 4_000_000_000, 4_000_000_000)

SEND = """
import socket, sys, time
data = bytes(1 << 20)
s = socket.create_connection((sys.argv[1], 7200)); begin = time.monotonic(); sent = 0
while time.monotonic() - begin < 1.0: sent += s.send(data)
s.shutdown(socket.SHUT_WR); s.recv(1)
print(sent / (time.monotonic() - begin))
"""
CONNECT = """
import socket, struct, sys, time
begin, count = time.monotonic(), 0
while count < 2000:
    s = socket.socket(); s.connect((sys.argv[1], 7201))
    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)); s.close(); count += 1
print(count / (time.monotonic() - begin))
"""
SINK = """
import socket, sys, threading
def sink(c):
    buffer = bytearray(1 << 20)
    while c.recv_into(buffer): pass
    c.send(b"."); c.close()
def sinks(l):
    while True: threading.Thread(target=sink, args=(l.accept()[0],), daemon=True).start()
def closes(l):
    while True: l.accept()[0].close()
big, small = socket.create_server((sys.argv[1], 7200)), socket.create_server((sys.argv[1], 7201), backlog=4096)
threading.Thread(target=sinks, args=(big,), daemon=True).start()
print("ready", flush=True); closes(small)
"""


def namespace() -> int:
    """A network namespace with no process in it; its descriptor is out of the way of select(2), which knows 1,024."""
    pid = os.fork()
    if pid == 0:
        syscalls.unshare(syscalls.CLONE_NEWNET)
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    os.waitpid(pid, os.WUNTRACED)
    low = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    fd = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 3000)
    os.close(low)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return fd


class Population:
    """Network namespaces, each with a place in the network."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.spaces: list[int] = []
        self.admitted: list[tuple[str, Place]] = []

    def _admit(self, fd: int) -> tuple[str, Place]:
        container = f"sbx-{self._config.host}-{os.urandom(4).hex()}"
        place = admit.lease(self._config, admit.Wish(container, "bench.1", "bench", Egress(), FREE, 5000))
        admit.connect(self._config, place, f"/proc/self/fd/{fd}")
        return link_name(container), place

    def make(self, count: int) -> None:
        """Only the namespaces: a container has one whether it has a network or not."""
        while len(self.spaces) < count:
            self.spaces.append(namespace())

    def grow(self, count: int) -> None:
        self.make(count)
        while len(self.admitted) < count:
            self.admitted.append(self._admit(self.spaces[len(self.admitted)]))

    def time_one(self, fd: int) -> tuple[float, float]:
        """Milliseconds to admit one more, and to remove it again."""
        begin = time.perf_counter()
        link, place = self._admit(fd)
        admitted = time.perf_counter()
        admit.withdraw(self._config, link, str(place.address))
        return (admitted - begin) * 1000, (time.perf_counter() - admitted) * 1000

    def clear(self) -> None:
        for fd in self.spaces:
            os.close(fd)
        for link, place in self.admitted:
            admit.withdraw(self._config, link, str(place.address))


def run_in(fd: int, code: str, address: str) -> float:
    """Runs a program in a network namespace and returns the number it prints."""
    done = subprocess.run(
        ["nsenter", f"--net=/proc/self/fd/{fd}", sys.executable, "-I", "-c", code, address],
        capture_output=True, text=True, check=True, pass_fds=(fd,),
    )  # fmt: skip
    return float(done.stdout)


def memory_in_use() -> int:
    values = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    kernel = sum(int(values[key].split()[0]) for key in ("Slab", "Percpu", "KernelStack"))
    return kernel * 1024


def measure(instance: Instance, world: World, docker_host: str, image: str) -> str:
    """The section of docs/PERFORMANCE.md. The caller is in the machine's own namespace; the product is not."""
    config = Config(str(instance.state), str(instance.run_dir), docker_host, pool=instance.pool or "172.16.0.0/16")
    config.make_folders()
    layout = Layout(config)
    with world.host.entered():
        router.ensure(config, forwarding=True)
        guard.start(config)
    sink = subprocess.Popen(world.outside.argv(sys.executable, "-I", "-c", SINK, PUBLIC), stdout=subprocess.PIPE)
    sink.stdout.readline()
    docker = ["docker", "-H", docker_host]
    container = subprocess.run(
        [*docker, "run", "-d", "--rm", image, "/bin/sleep", "3600"], capture_output=True, text=True, check=True
    )
    name = container.stdout.strip()
    pid = int(
        subprocess.run(
            [*docker, "inspect", "-f", "{{.State.Pid}}", name], capture_output=True, text=True, check=True
        ).stdout
    )
    bridge = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    population = Population(config)
    times: dict[int, list[tuple[float, float]]] = {}
    rates: dict[str, dict[str, list[float]]] = {}
    costs = (0.0, 0.0, 0.0)
    try:
        with world.host.entered():
            spare = namespace()
            for count in POPULATIONS:
                if count == 2000:
                    population.make(count)
                    time.sleep(1)
                    before, already = memory_in_use(), len(population.admitted)
                    population.grow(500)
                    time.sleep(1)
                    grown = (memory_in_use() - before) * 500 / (500 - already)
                    costs = (grown, *idle(layout))
                population.grow(count)
                population.time_one(spare)
                times[count] = [population.time_one(spare) for _ in range(ROUNDS)]
                if count != 100:
                    rates |= paths(count, bridge, population.spaces[0])
            os.close(spare)
    finally:
        with world.host.entered():
            population.clear()
        os.close(bridge)
        sink.kill()
        sink.communicate()
        subprocess.run([*docker, "kill", name], capture_output=True, check=False)
    return render(times, rates, costs)


def paths(count: int, bridge: int, dyno: int) -> dict[str, dict[str, list[float]]]:
    """Throughput and connection rate of both paths, in turn."""
    ours, theirs = f"dyno, {count} admitted", "Docker bridge" if count == 1 else "Docker bridge, later"
    found: dict[str, dict[str, list[float]]] = {name: {"throughput": [], "connections": []} for name in (theirs, ours)}
    for _ in range(ROUNDS):
        for name, fd in ((theirs, bridge), (ours, dyno)):
            found[name]["throughput"].append(run_in(fd, SEND, PUBLIC))
            found[name]["connections"].append(run_in(fd, CONNECT, PUBLIC))
    return found


def idle(layout: Layout) -> tuple[float, float]:
    """Resident MiB of guard and resolver, and their CPU seconds in five idle seconds."""
    pid = int(Path(f"{layout.folder}/guard.lock").read_text())
    resolver = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def pss(process: int) -> float:
        return int(Path(f"/proc/{process}/smaps_rollup").read_text().split("\nPss:")[1].split()[0]) / 1024

    def cpu() -> float:
        fields = [Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split() for process in (pid, resolver)]
        return sum(int(f[11]) + int(f[12]) for f in fields) / os.sysconf("SC_CLK_TCK")

    begin = cpu()
    time.sleep(5)
    return pss(pid) + pss(resolver), cpu() - begin


def render(times: dict, rates: dict, costs: tuple[float, float, float]) -> str:
    median = statistics.median
    both = {count: median(a + r for a, r in values) for count, values in times.items()}
    out = [
        "## The network wall\n",
        "In network namespaces of one machine. One dyno more, admitted and removed, beside others that are admitted:\n",
        "| admitted | admit ms | remove ms | both ms |",
        "|---|---|---|---|",
        *(
            f"| {n} | {median(a for a, _ in v):.1f} | {median(r for _, r in v):.1f} | {both[n]:.1f} |"
            for n, v in times.items()
        ),
        "\nTo a listener beyond the host, from a dyno and from a container on Docker's bridge, in turn, caps lifted:\n",
        "| from | Gbit/s | new connections/s |",
        "|---|---|---|",
        *(
            f"| {name} | {median(v['throughput']) * 8 / 1e9:.1f} | {median(v['connections']):.0f} |"
            for name, v in rates.items()
        ),
        "\n| target | measured | bound | holds |",
        "|---|---|---|---|",
    ]

    def row(what: str, value: float, bound: float, *, most: bool, unit: str = "") -> str:
        good = value <= bound if most else value >= bound
        return f"| {what} | {value:.2f}{unit} | {'at most' if most else 'at least'} {bound}{unit} | {'yes' if good else '**no**'} |"

    def ratio(kind: str, one: str, other: str) -> float:
        return median(a / b for a, b in zip(rates[one][kind], rates[other][kind], strict=True))

    few, many = "dyno, 1 admitted", "dyno, 2000 admitted"
    out += [
        row("admit and remove, 2000 admitted", both[2000], 25, most=True, unit=" ms"),
        row("admit and remove, 2000 × 1 admitted", both[2000] / both[1], 1.25, most=True),
        row("throughput × Docker bridge", ratio("throughput", few, "Docker bridge"), 0.95, most=False),
        row("connection rate × Docker bridge", ratio("connections", few, "Docker bridge"), 0.9, most=False),
    ]
    for kind in ("throughput", "connections"):
        # Against the bridge both times: the machine's own speed drifts over the minutes in between.
        change = ratio(kind, many, "Docker bridge, later") / ratio(kind, few, "Docker bridge")
        out.append(row(f"{kind}, 2000 × 1 admitted", change, 0.97, most=False))
    kernel, resident, cpu = costs
    out += [
        row(
            "500 admitted: kernel memory beside their bare namespaces, guard and resolver",
            kernel / (1 << 20) + resident,
            100,
            most=True,
            unit=" MiB",
        ),
        row("500 admitted, idle: CPU of guard and resolver", cpu / 5 * 100, 1, most=True, unit=" %"),
        f"\nOf the memory, {resident:.0f} MiB are the guard and the resolver, the same for one dyno and for 2,000.",
        "",
    ]
    return "\n".join(out)
