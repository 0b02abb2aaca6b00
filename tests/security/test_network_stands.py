"""The wall stands from the first packet, and when somebody or something takes a part of it away.

Every flush happens in namespaces of the tests; the machine's own rules are never touched.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import EXAMPLES, census, make_app, make_instance, wait_for
from tests.security.cell import LOOP, Cell, delete_rules, events, guard_pid, hold_guard, records, router, show
from tests.world import DECOYS, HOST, METADATA, PRIVATE, PUBLIC

SHELL = str(EXAMPLES / "shell")
COMMAND = ("--", "python3", "-uc", LOOP)
PORT = 7003
STARTS = 200


@pytest.fixture(scope="module")
def wall(home, docker_host, world):
    for other in records_elsewhere(world):
        other.remove_network()
    instance = make_instance(home, "stands", docker_host)
    for address in DECOYS:
        world.listeners.add(world.outside, address, PORT)
    world.listeners.add(world.host, HOST, PORT)
    return instance


FIRST = """
#include <arpa/inet.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
/* The first act of the process: connect and send to everything local, before anything else. */
int main(void) {
    const char *places[] = {PLACES};
    for (int i = 0; i < (int)(sizeof places / sizeof *places); i++) {
        struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(PORT)};
        inet_pton(AF_INET, places[i], &to.sin_addr);
        int udp = socket(AF_INET, SOCK_DGRAM, 0), tcp = socket(AF_INET, SOCK_STREAM, 0);
        sendto(udp, "first", 5, 0, (struct sockaddr *)&to, sizeof to);
        fcntl(tcp, F_SETFL, O_NONBLOCK);
        connect(tcp, (struct sockaddr *)&to, sizeof to);
    }
    usleep(50000);
    puts("tried");
    return 0;
}
"""


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    base = tmp_path_factory.mktemp("first")
    base.chmod(0o755)
    places = ", ".join(f'"{address}"' for address in (PRIVATE, METADATA, HOST))
    (base / "first.c").write_text(FIRST.replace("PLACES", places).replace("PORT", str(PORT)))
    app = make_app(base, {"Procfile": "worker: ./first\n"})
    subprocess.run(["gcc", "-O1", "-static", "-o", f"{app}/first", f"{base}/first.c"], check=True)
    return app


def local_seen(world) -> int:
    return sum(
        world.listeners.count(f"{kind} {address}:{PORT}")
        for kind in ("tcp", "udp")
        for address in (PRIVATE, METADATA, HOST)
    )


@pytest.mark.timeout(900)
def test_the_first_packet_meets_the_wall(wall, world, engine, first):
    """200 starts of a program whose first act is to send: nothing arrives, and every start is in the counters."""
    seen = local_seen(world)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda _: wall("run", "-q", "--raw", "--engine", engine, first, "worker"), range(STARTS)))
    assert [item.status for item in done] == [0] * STARTS, [item for item in done if item.status][:1]
    assert all(item.out == "tried\n" for item in done)
    assert local_seen(world) == seen
    totals = wall("firewall", "denied", "--json").json()["totals"]
    ids = {t["id"] for t in totals if t["rule"] == "private"}
    assert len(ids) >= STARTS, "every start tried, and was counted"


def test_control_without_the_deny_rule_the_first_packet_arrives(wall, home, world, docker_host, first, engine):
    instance = make_instance(home, f"open-{engine}", docker_host)
    seen = local_seen(world)
    done = instance("run", "-q", "--raw", "--engine", engine, first, "worker", mutant="no-deny")
    assert done.status == 0, done
    assert local_seen(world) - seen >= 4
    instance.remove_network()


def test_control_a_wall_that_comes_late_lets_the_first_packet_out(wall, home, world, docker_host, first):
    """As the field does it: the process first, then the rules."""
    instance = make_instance(home, "late", docker_host)
    seen = local_seen(world)
    done = instance("run", "-q", "--raw", "--engine", "oci", first, "worker", mutant="late-wall")
    assert done.status == 0, done
    assert local_seen(world) > seen
    instance.remove_network()


CLOSED = {
    "nft-missing": "libnftables is not installed",
    "nft-refuses": "nftables refused a change",
    "set-full": "nftables refused a change: a set is full",
    "veth-gone": "network: promised",
    "no-source-element": "network: promised",
    "no-dnsmasq": "dnsmasq is not installed",
    "dead-resolver": "guard ended before it was ready",
    "ipv6-stays-on": "network: promised",
}


@pytest.fixture(scope="module")
def faulty(home, docker_host):
    """One instance for all faults: its router is made anew for each."""
    return make_instance(home, "faulty", docker_host)


@pytest.mark.parametrize("fault", CLOSED)
def test_a_step_that_fails_refuses_the_start(faulty, fault, engine):
    command = ("run", "--raw", "--engine", engine, SHELL, "--", "sh", "-c", "echo APP RAN")
    done = faulty(*command, mutant=fault)
    assert done.status == 125, done
    assert CLOSED[fault] in done.err, done
    assert "APP RAN" not in done.out
    assert census(faulty) == []
    faulty.remove_network()
    # The control: the same command without the fault.
    assert faulty(*command).out == "APP RAN\n"
    faulty.remove_network()


class Knocking:
    """A dyno that tries, again and again, to reach what is denied and what is allowed; and what got through."""

    def __init__(self, wall, world, engine: str = "oci") -> None:
        self.world, self.cell = world, Cell(wall, engine, app=SHELL, process=COMMAND)
        self.cell(f"""
import threading, time
reached, stop = [], []
def knock():
    while not stop:
        for place in (("{PRIVATE}", {PORT}), ("{METADATA}", {PORT}), ("{HOST}", {PORT})):
            u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.setblocking(False)
            try: u.sendto(b"knock", place)
            except OSError: pass
            t = socket.socket(); t.setblocking(False); t.connect_ex(place)
            time.sleep(0.002); u.close(); t.close()
threads = [threading.Thread(target=knock, daemon=True) for _ in range(2)]
for t in threads: t.start()
""")
        self.seen = local_seen(world)

    def public(self) -> bool:
        return bool(self.cell.attempt([("tcp", PUBLIC, PORT)], wait=0.3))

    def close(self) -> None:
        self.cell("stop.append(1)")
        self.cell.close()
        assert local_seen(self.world) == self.seen, "something denied was reached"


def repaired(wall, before: int, what: str) -> dict:
    """The guard's record of a repair, and that the wall is as it was made again."""
    found = wait_for(
        lambda: [e for e in events(wall, "firewall repaired")[before:] if what in e["what"]],
        10,
        f"the repair of {what}",
    )
    assert show(wall)["faults"] == []
    return found[0]


TAKEN = {
    "host ruleset flushed": ("host table", lambda w, h, r: h("nft", "flush", "ruleset")),
    "our host table deleted": (
        "host table",
        lambda w, h, r: h("nft", "delete", "table", "inet", f"sandbox_{show(w)['link'][4:]}"),
    ),
    "a rule of our host table deleted": (
        "host table",
        lambda w, h, r: delete_rules(h, f"inet sandbox_{show(w)['link'][4:]}", "fib daddr"),
    ),
    "router ruleset flushed": ("router table", lambda w, h, r: r("nft", "flush", "ruleset")),
    "router table deleted": ("router table", lambda w, h, r: r("nft", "delete", "table", "inet", "sandbox")),
    "one deny rule deleted": ("router table", lambda w, h, r: delete_rules(r, "inet sandbox", "map @deny4")),
    "a denied range deleted": (
        "router table",
        lambda w, h, r: r("nft", "delete", "element", "inet", "sandbox", "deny4", "{", METADATA, "}"),
    ),
    "an accept rule added": (
        "router table",
        lambda w, h, r: r("nft", "insert", "rule", "inet", "sandbox", "forward", "accept"),
    ),
    "routing rules of the router removed": (
        "router routing rules",
        lambda w, h, r: (r("ip", "rule", "del", "pref", "100"), r("ip", "rule", "del", "pref", "101")),
    ),
    "routing rule of the host removed": ("host routing rule", lambda w, h, r: h("ip", "rule", "del", "pref", "9100")),
    "forwarding switched off": (
        "forwarding",
        # A change of the whole host's switch reaches every device; writing what it is already reaches none.
        lambda w, h, r: [h("sysctl", "-qw", f"net.ipv4.ip_forward={on}") for on in (1, 0)],
    ),
}
# These open a hole for as long as nobody notices: the rule alone is gone, and the rest still lets packets pass.
OPENS = ("one deny rule deleted", "a denied range deleted")


@pytest.mark.parametrize("taken", [name for name in TAKEN if name not in OPENS])
def test_at_no_moment_is_a_denied_place_reached(wall, world, taken):
    knocking = Knocking(wall, world)
    assert knocking.public()
    before = len(events(wall, "firewall repaired"))
    TAKEN[taken][1](wall, world.host.run, lambda *words: router(wall, *words))
    event = repaired(wall, before, TAKEN[taken][0])
    assert event["window_ms"] < 2000, event
    if "table" in TAKEN[taken][0]:
        assert re.match(r"nft \(pid \d+\)$", event["by"]), event
    if "rule" in TAKEN[taken][0]:
        assert "(pid " in event["by"], event
    wait_for(knocking.public, 5, "the internet, again")
    knocking.close()


@pytest.mark.parametrize("taken", OPENS)
def test_a_rule_taken_out_by_root_is_back_within_a_second(wall, world, taken):
    """Root in the router can open a hole; it is closed again, and who did it is on record with the window."""
    cell = Cell(wall, "oci", app=SHELL, process=COMMAND)
    before = len(events(wall, "firewall repaired"))
    TAKEN[taken][1](wall, world.host.run, lambda *words: router(wall, *words))
    event = repaired(wall, before, "router table")
    assert event["by"].startswith("nft (pid ")
    assert event["window_ms"] < 1000
    seen = local_seen(world)
    assert cell.attempt([("tcp", PRIVATE, PORT), ("tcp", METADATA, PORT)]) == set()
    assert local_seen(world) == seen
    cell.close()


def test_with_the_guard_held_every_loss_still_fails_closed(wall, world):
    """Nobody repairs: the tables of router and host are gone, and stay gone; still nothing denied is reached."""
    knocking = Knocking(wall, world)
    pid = hold_guard(wall)
    try:
        world.host.run("nft", "flush", "ruleset")
        time.sleep(0.3)
        router(wall, "nft", "flush", "ruleset")
        time.sleep(0.5)
        assert not knocking.public(), "without the table nothing is routed"
        router(wall, "ip", "rule", "del", "pref", "100")
        time.sleep(0.3)
        assert not knocking.public()
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_for(knocking.public, 10, "the guard's repair")
    knocking.close()


def test_control_with_routes_where_others_have_them_a_flush_opens(wall, world):
    """The clause that fails closed is the routing by mark: with routes in the main table, a lost table lets packets out."""
    knocking = Knocking(wall, world)
    pid = hold_guard(wall)
    host_address = show(wall)["host_address"]
    try:
        router(wall, "ip", "route", "add", host_address, "dev", "uplink")
        router(wall, "ip", "route", "add", "default", "via", host_address)
        router(wall, "ip", "route", "add", knocking.cell.address, "dev", knocking.cell.link)
        router(wall, "nft", "flush", "ruleset")
        world.host.run("nft", "flush", "ruleset")
        wait_for(lambda: local_seen(world) > knocking.seen, 5, "the control's packets")
    finally:
        router(wall, "ip", "route", "flush", "table", "main")
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: show(wall)["faults"] == [], 10, "the repair")
    time.sleep(0.3)
    knocking.seen = local_seen(world)
    knocking.close()


def test_the_next_command_repairs_when_there_is_no_guard(wall, world):
    cell = Cell(wall, "oci", app=SHELL, process=COMMAND)
    os.kill(guard_pid(wall), signal.SIGKILL)
    time.sleep(0.1)
    world.host.run("nft", "flush", "ruleset")
    assert "host table" in show(wall)["faults"]
    before = len(events(wall, "firewall repaired"))
    assert wall("firewall", "show").status == 1
    assert wall("run", "-q", "--raw", "--engine", "oci", SHELL, "--", "true").status == 0
    assert show(wall)["faults"] == []
    (event,) = events(wall, "firewall repaired")[before:]
    assert event["what"] == ["host table"]
    assert event["by"] == "unknown", "nobody was there to see it"
    assert cell.attempt([("tcp", PUBLIC, PORT)])
    cell.close()


def test_one_of_two_accepts_is_made_up_for_once(quiet, world):
    """Half of ours in another firewall's chain: put back to two, and not to more and more."""
    instance = quiet("half")
    world.host.run("nft", "-f", "-", stdin=FOREIGN_RULES["docker"])
    try:
        cell = Cell(instance, "oci", app=SHELL, process=COMMAND)
        link = show(instance)["link"]
        delete_rules(world.host.run, "ip filter", f'oifname "{link}" counter')
        wait_for(lambda: bool(cell.attempt([("tcp", PUBLIC, PORT)], wait=0.3)), 5, "the accept, again")
        time.sleep(1)
        assert world.host.run("nft", "list", "ruleset").count(f'comment "sandbox {link}"') == 2
        cell.close()
        instance.remove_network()
    finally:
        world.host.run("nft", "delete", "table", "ip", "filter")


def test_a_take_down_that_was_killed_is_begun_again(quiet, world):
    instance = quiet("halfway")
    before = host_state(world)
    assert instance("run", "-q", "--engine", "oci", SHELL, "--", "true").status == 0
    done = instance("firewall", "remove", mutant="die-in-take-down")
    assert done.status == -signal.SIGKILL
    assert instance("run", "-q", "--raw", "--engine", "oci", SHELL, "--", "echo", "fine").out == "fine\n"
    instance.remove_network()
    assert host_state(world) == before


def test_gc_removes_a_router_without_dyno_and_guard(quiet, world):
    instance = quiet("orphan")
    before = host_state(world)
    assert instance("run", "-q", "--engine", "oci", SHELL, "--", "true").status == 0
    os.kill(guard_pid(instance), signal.SIGKILL)
    time.sleep(0.1)
    assert "the router, which had no dyno and no guard" in instance("gc").out
    assert host_state(world) == before


def test_a_neighbour_cannot_take_the_host_for_a_router(quiet, world):
    """Forwarding is switched on for our link alone: what was no router before is none for anybody else."""
    instance = quiet("norouter")
    for others in records_elsewhere(world):
        others.remove_network()
    world.host.run("sysctl", "-qw", "net.ipv4.conf.eth0.forwarding=0")
    world.host.run("ip", "link", "add", "behind", "type", "veth", "peer", "name", "behind1")
    world.host.run("ip", "link", "set", "behind1", "up")
    world.host.run("ip", "address", "add", "10.66.0.1/24", "dev", "behind")
    world.host.run("ip", "link", "set", "behind", "up")
    world.host.run("ip", "neigh", "add", "10.66.0.9", "lladdr", "02:00:00:00:00:09", "dev", "behind")
    world.host.run(
        "nft",
        "add table ip probe; add chain ip probe out { type filter hook postrouting priority 200; }; add rule ip probe out oifname behind counter",
    )
    world.outside.run("ip", "route", "add", "10.66.0.0/24", "via", HOST)

    def passed() -> int:
        code = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('10.66.0.9', 9))"
        world.outside.run("python3", "-c", code)
        return int(world.host.run("nft", "list", "table", "ip", "probe").split("packets ")[1].split()[0])

    try:
        cell = Cell(instance, "oci", app=SHELL, process=COMMAND)
        assert world.host.run("sysctl", "-n", "net.ipv4.conf.eth0.forwarding").strip() == "1"
        assert passed() == 0
        link = show(instance)["link"]
        hold_guard(instance)
        delete_rules(world.host.run, f"inet sandbox_{link[4:]}", "eth0")
        assert passed() == 1, "the control: without that rule the host is a router"
        os.kill(guard_pid(instance), signal.SIGCONT)
        cell.close()
    finally:
        world.host.run("nft", "delete", "table", "ip", "probe")
        world.host.run("ip", "link", "delete", "behind")
        world.outside.run("ip", "route", "delete", "10.66.0.0/24")


def test_the_operators_newer_list_is_in_force_with_the_next_start(home, docker_host, world, tmp_path):
    instance = make_instance(home, "newer", docker_host)
    cell = Cell(instance, "oci", app=SHELL, process=COMMAND)
    assert cell.attempt([("tcp", PUBLIC, PORT)])
    instance.config = str(tmp_path / "host.toml")
    Path(instance.config).write_text(f'deny = ["{PUBLIC}/32"]\n')
    assert "denied ranges" in show(instance)["faults"]
    assert instance("run", "-q", "--engine", "oci", SHELL, "--", "true").status == 0
    assert show(instance)["faults"] == []
    assert cell.attempt([("tcp", PUBLIC, PORT)]) == set()
    assert {key[3] for key in cell.denied()} == {"operator"}
    cell.close()
    instance.remove_network()


@pytest.fixture
def quiet(home, docker_host, world):
    """A host namespace with nothing of ours in it, and an instance that is not yet on it."""
    made = []

    def make(name: str):
        instance = make_instance(home, name, docker_host)
        made.append(instance)
        return instance

    yield make
    for instance in made:
        instance.remove_network()


def host_state(world) -> str:
    run = world.host.run
    parts = [
        run("nft", "-s", "list", "ruleset"),
        run("ip", "-o", "link"),
        run("ip", "-4", "-o", "address"),
        run("ip", "rule"),
    ]
    parts.append(run("ip", "route", "show", "table", "all"))
    parts.append(
        run(
            "sh",
            "-c",
            "grep -r . /proc/sys/net/ipv4/conf /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv6/conf 2>/dev/null | grep -v stable_secret",
        )
    )
    return "\n".join(parts)


FOREIGN_RULES = {
    "docker": """
table ip filter {
  chain DOCKER-USER {
    counter return
  }
  chain FORWARD {
    type filter hook forward priority filter; policy drop;
    counter jump DOCKER-USER
    oifname "docker0" ct state established,related counter accept
  }
}
""",
    "ufw": """
table ip filter {
  chain ufw-before-forward {
    ct state established,related counter accept
  }
  chain ufw-before-input {
    iifname "lo" counter accept
    ct state established,related counter accept
  }
  chain INPUT {
    type filter hook input priority filter; policy drop;
    counter jump ufw-before-input
  }
  chain FORWARD {
    type filter hook forward priority filter; policy drop;
    counter jump ufw-before-forward
  }
}
""",
    "firewalld": """
table inet firewalld {
  chain filter_INPUT {
    type filter hook input priority filter + 10; policy accept;
    ct state { established, related } accept
    iifname "lo" accept
    reject with icmpx admin-prohibited
  }
  chain filter_FORWARD {
    type filter hook forward priority filter + 10; policy accept;
    ct state { established, related } accept
    ct status dnat accept
    iifname "lo" accept
    reject with icmpx admin-prohibited
  }
}
""",
}


@pytest.mark.parametrize("other", FOREIGN_RULES)
def test_beside_another_firewall(quiet, world, other):
    """The rules as those programs write them: a dyno reaches the internet, the host reaches the dyno, and a reload of
    theirs is noticed; in the end theirs are as they were, byte for byte.
    """
    instance = quiet(f"beside-{other}")
    for others in records_elsewhere(world):
        others.remove_network()
    world.host.run("nft", "-f", "-", stdin=FOREIGN_RULES[other])
    try:
        before = host_state(world)
        cell = Cell(instance, "oci", app=SHELL, process=COMMAND)
        assert cell.attempt([("tcp", PUBLIC, PORT)])
        cell(
            "import socket; result = socket.gethostbyname('app.example')"
        ) if "app.example" in world.names.zone else None
        listing = world.host.run("nft", "list", "ruleset")
        assert listing.count('comment "sandbox ') == 2, "one accept for our link, in each direction, and nothing else"
        # A reload of theirs: all their rules, and ours among them, are gone and come back without ours.
        table = "inet firewalld" if other == "firewalld" else "ip filter"
        world.host.run("nft", "delete", "table", *table.split())
        world.host.run("nft", "-f", "-", stdin=FOREIGN_RULES[other])
        wait_for(lambda: bool(cell.attempt([("tcp", PUBLIC, PORT)], wait=0.3)), 5, "the accept, again")
        cell.close()
        instance.remove_network()
        assert host_state(world) == before
    finally:
        world.host.run("nft", "flush", "ruleset")


def records_elsewhere(world):
    """Instances of other tests that still have a router here: each would add an accept of its own."""
    found = []
    for action in world.on_close:
        instance = action.__self__
        if (instance.run_dir / "net" / "router").exists() and not records(instance):
            found.append(instance)
    return found


def test_removing_everything_restores_the_host(quiet, world):
    instance = quiet("restore")
    for others in records_elsewhere(world):
        others.remove_network()
    before = host_state(world)
    assert "sandbox" not in before
    cell = Cell(instance, "oci", app=SHELL, process=COMMAND)
    assert host_state(world) != before
    refused = instance("firewall", "remove")
    assert refused.status == 2
    assert "dynos still use the network" in refused.err
    cell.close()
    instance.remove_network()
    assert host_state(world) == before


def test_the_router_leaves_by_itself_when_nobody_needs_it(quiet, world, tmp_path):
    instance = quiet("leaves")
    for others in records_elsewhere(world):
        others.remove_network()
    before = host_state(world)
    instance.config = str(tmp_path / "host.toml")
    Path(instance.config).write_text("linger_s = 1\n")
    assert instance("run", "-q", "--engine", "oci", SHELL, "--", "true").status == 0
    assert host_state(world) != before
    wait_for(lambda: host_state(world) == before, 20, "the router's leave")
    assert instance("run", "-q", "--raw", "--engine", "oci", SHELL, "--", "echo", "again").out == "again\n"


@pytest.mark.timeout(300)
def test_beside_a_real_docker_and_its_restart(home, world, quiet, tmp_path):
    """A dockerd with a bridge and iptables in the host's namespace: FORWARD policy DROP, and a restart of it."""
    base = home / "bridge"
    base.mkdir(exist_ok=True)

    def daemon():
        command = (
            *("dockerd", "--data-root", f"{base}/data", "--exec-root", f"{base}/exec"),
            *("-H", f"unix://{base}/docker.sock", "-p", f"{base}/pid"),
        )
        with (base / "log").open("wb") as log:
            process = subprocess.Popen(world.host.argv(*command), stdout=log, stderr=log, start_new_session=True)
        wait_for(lambda: b"API listen" in (base / "log").read_bytes(), 60, "dockerd")
        return process

    process = daemon()
    instance = quiet("beside-dockerd")
    try:
        assert "policy drop" in world.host.run("nft", "list", "chain", "ip", "filter", "FORWARD")
        knocking = Knocking(instance, world)
        assert knocking.public()
        world.host.run("iptables", "-F", "FORWARD")
        wait_for(knocking.public, 5, "the accept after iptables -F")
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        process = daemon()
        wait_for(knocking.public, 10, "the accept after a restart of dockerd")
        assert "incompatible" not in world.host.run("iptables", "-S", "FORWARD")
        knocking.close()
        instance.remove_network()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        from tests.conftest import unmount_below

        unmount_below(base)
        world.host.run("nft", "flush", "ruleset")
        world.host.run("ip", "link", "delete", "docker0", check=False)


def test_a_pool_that_the_host_routes_already_is_refused(home, docker_host, world):
    instance = make_instance(home, "clash", docker_host)
    instance.pool = "192.168.0.0/16"
    done = instance("run", "--engine", "oci", SHELL, "--", "true")
    assert done.status == 125
    assert "the address pool 192.168.0.0/16 overlaps 192.168.77.0/24, which this host routes already" in done.err
    assert census(instance) == []
    assert not (instance.run_dir / "net" / "router").exists()


def test_no_free_place_is_said_and_changes_nothing(home, docker_host):
    instance = make_instance(home, "small", docker_host)
    instance.pool = "10.77.1.0/28"
    cells = [Cell(instance, "oci", app=SHELL, process=COMMAND) for _ in range(3)]
    done = instance("run", "--engine", "oci", SHELL, "--", "true")
    assert done.status == 125
    assert "no free /30 is left in the pool 10.77.1.0/28: all 3 are in use" in done.err
    assert len({cell.address for cell in cells}) == 3
    cells.pop().close()
    assert instance("run", "-q", "--engine", "oci", SHELL, "--", "true").status == 0
    for cell in cells:
        cell.close()
    instance.remove_network()


def test_a_late_packet_for_the_last_owner_reaches_nobody(home, docker_host, world):
    """The same address, lent again: flows of its last owner are forgotten before the link is up."""
    instance = make_instance(home, "reuse", docker_host)
    instance.pool = "10.77.2.0/29"
    first = Cell(instance, "oci", app=SHELL, process=COMMAND)
    first(
        f"import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('0.0.0.0', 4444)); s.sendto(b'x', ('{PUBLIC}', {PORT}))"
    )
    address = first.address
    assert (
        address in router(instance, "cat", "/proc/net/nf_conntrack")
        if Path("/proc/net/nf_conntrack").exists()
        else True
    )
    first.close()
    second = Cell(instance, "oci", app=SHELL, process=COMMAND)
    assert second.address == address
    listed = subprocess.run(
        ["nsenter", f"--net={instance.run_dir}/net/router", "conntrack", "-L"],
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        assert f"src={address}" not in listed.stdout
    second.close()
    instance.remove_network()


def test_every_value_in_a_rule_is_ours_or_an_address(wall, tmp_path):
    """Names, apps and lists that would be commands of nftables, if they were ever text in one."""
    hostile = 'x" } ; flush ruleset ; add table inet evil { "'
    app = make_app(
        tmp_path, {"sandbox.toml": f'egress = "allow"\nallow = [{json.dumps(hostile)}]\n', "run!": "#!/bin/sh\n"}
    )
    tmp_path.chmod(0o755)
    done = wall("run", "--engine", "oci", app)
    assert done.status == 2
    assert "neither an IPv4 network nor a domain name" in done.err
    named = make_app(
        tmp_path / "sub" if (tmp_path / "sub").mkdir() is None else tmp_path, {"run!": "#!/bin/sh\necho fine\n"}
    )
    os.rename(named, f"{tmp_path}/sub/; flush ruleset")
    assert "fine" in wall("run", "--engine", "oci", f"{tmp_path}/sub/; flush ruleset").out
    assert show(wall)["faults"] == []
