"""A dyno under the experimenter's hand: programs go in one by one, results come back; and a wall with one clause out."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import Instance, make_app, wait_for

LOOP = """
import json, sys
env = {}
print("ready", flush=True)
for line in sys.stdin:
    env["result"] = None
    exec(json.loads(line), env)
    print(json.dumps(env["result"]), flush=True)
"""

# Sends to many places at once and says who answered. Every target is (protocol, address, port).
ATTEMPT = """
import socket, select, time
def attempt(targets, wait=0.8, bind=None):
    open_, answered, failed = {}, [], {}
    for target in targets:
        protocol, address, port = target
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        s = socket.socket(family, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        s.setblocking(False)
        try:
            if bind: s.bind(bind)
            if protocol == "tcp":
                s.connect_ex((address, port))
            else:
                s.sendto(b"probe", (address, port))
            open_[s] = target
        except OSError as error:
            failed[str(target)] = error.errno
    until = time.monotonic() + wait
    while open_ and time.monotonic() < until:
        for s in select.select(list(open_), [], [], 0.05)[0]:
            target = open_.pop(s)
            try:
                if s.recv(100): answered.append(target)
            except OSError as error:
                failed[str(target)] = error.errno
            s.close()
    for s in open_: s.close()
    return {"answered": answered, "failed": failed}
"""


OPEN: list[Cell] = []


class Cell:
    """A live dyno that runs what it is told."""

    def __init__(
        self, sandbox: Instance, engine: str, *options: str, app: str, process: tuple[str, ...], mutant: str = ""
    ) -> None:
        self.sandbox, self.engine = sandbox, engine
        before = {record["id"] for record in records(sandbox)}
        self.process = sandbox.start(
            "run", "--raw", "-q", "--engine", engine, *options, app, *process, stdin=subprocess.PIPE, mutant=mutant
        )
        OPEN.append(self)
        line = self.process.stdout.readline()
        assert line == b"ready\n", (line, self.process.communicate())
        self.record = next((record for record in records(sandbox) if record["id"] not in before), {})
        self("1" + ATTEMPT)

    def __call__(self, code: str) -> object:
        self.process.stdin.write(json.dumps(code).encode() + b"\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.process.communicate()
        return json.loads(line)

    def attempt(self, targets: list[tuple[str, str, int]], **more: object) -> set[tuple[str, str, int]]:
        """Who answered."""
        found = self(f"result = attempt({targets!r}, **{more!r})")
        return {tuple(target) for target in found["answered"]}

    @property
    def address(self) -> str:
        return str(self.record["address"])

    @property
    def link(self) -> str:
        return str(self.record["link"])

    @property
    def pid(self) -> int:
        """A process of it, seen from the host."""
        for name in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                if name.isdigit() and Path(f"/proc/{name}/cgroup").read_text().count(self.record["id"]):
                    return int(name)
        raise AssertionError("it has no process")

    def as_root(self, code: str) -> object:
        """Runs a program as the host's root in the dyno's network namespace: with every right a hole could give."""
        done = subprocess.run(
            ["nsenter", "-t", str(self.pid), "-n", "python3", "-c", f"{ATTEMPT}\nimport json\n{code}\nprint(json.dumps(result))"],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def denied(self) -> Counter[tuple[object, ...]]:
        """(protocol, address, port, rule) → packets, from the kernel's counters."""
        document = self.sandbox("firewall", "denied", "--json", self.record["id"]).json()
        return Counter(
            {
                (d["protocol"], d["address"], d["port"], d["rule"]): d["packets"]
                for d in document["denied"]
                if d["direction"] == "out"
            }
        )

    def totals(self) -> Counter[str]:
        document = self.sandbox("firewall", "denied", "--json", self.record["id"]).json()
        return Counter({t["rule"]: t["packets"] for t in document["totals"]})

    def close(self) -> None:
        if self in OPEN:
            OPEN.remove(self)
            self.process.communicate(timeout=60)


def records(sandbox: Instance) -> list[dict]:
    found = []
    for path in sandbox.run_dir.glob("net/dynos/*.json"):
        with contextlib.suppress(FileNotFoundError):
            found.append(json.loads(path.read_text()))
    return found


def web_app(base: Path) -> str:
    """An app whose web process is a cell."""
    return make_app(base, {"Procfile": "web: python3 -u loop.py\n", "loop.py": LOOP})


def router(sandbox: Instance, *words: str, stdin: str = "", check: bool = True) -> str:
    """A command in the router's network namespace, as an operator could give it."""
    done = subprocess.run(
        ["nsenter", f"--net={sandbox.run_dir}/net/router", *words],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not check or done.returncode == 0, (words, done.stderr)
    return done.stdout


def guard_pid(sandbox: Instance) -> int:
    return int((sandbox.run_dir / "net" / "guard.lock").read_text())


def show(sandbox: Instance) -> dict:
    return sandbox("firewall", "show", "--json").json()


def events(sandbox: Instance, event: str) -> list[dict]:
    path = sandbox.state / "log" / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [entry for entry in map(json.loads, lines) if entry["event"] == event]


def hold_guard(sandbox: Instance) -> int:
    """Stops the guard at a moment when it does not hold the router's lock; its pid."""
    pid = guard_pid(sandbox)
    with (sandbox.run_dir / "net" / "lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.kill(pid, signal.SIGSTOP)
    return pid


@contextlib.contextmanager
def without(
    sandbox: Instance,
    *,
    rules: tuple[str, ...] = (),
    ranges: tuple[str, ...] = (),
    host: tuple[str, ...] = (),
    add: tuple[str, ...] = (),
) -> Iterator[None]:
    """The wall without these rules (text that is in them) and denied ranges (their names), while the guard is held.

    Afterwards the guard goes on, and has to put everything back by itself.
    """
    wait_for(lambda: show(sandbox)["faults"] == [], 10, "a wall without faults")
    pid = hold_guard(sandbox)
    try:
        for part in rules:
            delete_rules(lambda *words: router(sandbox, *words), "inet sandbox", part)
        for item in show(sandbox)["denied"] if ranges else ():
            if item["rule"] in ranges or item["range"] in ranges:
                router(sandbox, "nft", "delete", "element", "inet", "sandbox", "deny4", "{", item["range"], "}")
        table = f"inet sandbox_{show(sandbox)['link'].removeprefix('sbx-')}"
        for part in host:
            delete_rules(sandbox.world.host.run, table, part)
        for text in add:
            router(sandbox, "nft", text)
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: show(sandbox)["faults"] == [], 10, "the guard's repair")


def delete_rules(run, table: str, part: str) -> None:
    chain, found = "", []
    for line in run("nft", "-a", "list", "table", *table.split()).splitlines():
        if match := re.match(r"\s+chain (\S+) \{", line):
            chain = match[1]
        elif part in line and (match := re.search(r"# handle (\d+)$", line)) and chain:
            found.append((chain, match[1]))
    assert found, f"no rule with {part!r}"
    for name, handle in found:
        run("nft", "delete", "rule", *table.split(), name, "handle", handle)
