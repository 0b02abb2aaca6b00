"""Names: whose resolver answers, what it never answers, and which addresses an answer opens for how long."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import EXAMPLES, make_instance, wait_for
from tests.security.cell import LOOP, Cell, guard_pid, records, router, without
from tests.world import DECOYS, METADATA, PRIVATE, PUBLIC, PUBLIC2

SHELL = str(EXAMPLES / "shell")
COMMAND = ("--", "python3", "-uc", LOOP)
PORT = 7002

LOOK_UP = """
import socket, struct
def look_up(name, tcp=False, server="172.16.0.23", kind=1, port=53):
    question = b"".join(bytes([len(p)]) + p.encode() for p in name.split(".")) + b"\\0" + struct.pack(">HH", kind, 1)
    query = struct.pack(">HHHHHH", 7, 0x100, 1, 0, 0, 0) + question
    s = socket.socket(socket.AF_INET, socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM); s.settimeout(2)
    try:
        s.connect((server, port))
        s.send((struct.pack(">H", len(query)) if tcp else b"") + query)
        data = s.recv(4096)
        if tcp:
            while len(data) < 2 or len(data) < 2 + int.from_bytes(data[:2]): data += s.recv(4096)
            data = data[2:]
    except OSError as error: return type(error).__name__
    finally: s.close()
    code, count, position, found = data[3] & 15, int.from_bytes(data[6:8]), 12 + len(question), []
    for _ in range(count):
        kind_, _, ttl, length = struct.unpack_from(">HHIH", data, position + 2)
        if kind_ == 1: found.append(socket.inet_ntoa(data[position + 12:position + 16]))
        position += 12 + length
    return [code, found, bool(data[2] & 2)]
"""


@pytest.fixture(scope="module")
def wall(home, docker_host, world):
    instance = make_instance(home, "names", docker_host)
    for address in DECOYS:
        world.listeners.add(world.outside, address, PORT)
    world.names.zone |= {
        "app.example": [PUBLIC],
        "deep.sub.app.example": [PUBLIC2],
        "big.example": [f"20.1.{n // 250}.{n % 250 + 1}" for n in range(90)],
        "private.example": [PRIVATE],
        "mixed.example": [PRIVATE, PUBLIC],
        "carrier.example": ["100.64.0.9"],
        "bench.example": ["198.18.5.5"],
        "meta.example": [METADATA],
        "flip.example": lambda asked: ([PUBLIC if asked % 2 else METADATA], 0),
        "brief.example": ([PUBLIC], 1),
        "six.example": [PUBLIC, "2606:2800:220:1::1"],
    }
    return instance


def make(wall, engine, *options: str) -> Cell:
    cell = Cell(wall, engine, *options, app=SHELL, process=COMMAND)
    cell(LOOK_UP)
    return cell


def connect(cell, address: str) -> bool:
    return cell.attempt([("tcp", address, PORT)]) == {("tcp", address, PORT)}


def test_public_names_resolve_by_datagram_and_by_connection(wall, engine):
    cell = make(wall, engine)
    for tcp in (False, True):
        assert cell(f"result = look_up('app.example', tcp={tcp})") == [0, [PUBLIC], False]
    assert cell("result = look_up('big.example')")[2] is True, "cut short, so that the C library asks by TCP"
    assert len(cell("result = look_up('big.example', tcp=True)")[1]) == 90
    assert cell(
        "result = sorted({a[4][0] for a in socket.getaddrinfo('big.example', 80, socket.AF_INET, socket.SOCK_STREAM)})"
    )
    assert cell("result = look_up('six.example', kind=28)") == [0, [], False], "no IPv6 answers: there is no IPv6"
    cell.close()


@pytest.mark.parametrize("name", ["private.example", "carrier.example", "bench.example", "meta.example"])
def test_a_private_answer_is_no_answer(wall, engine, name):
    cell = make(wall, engine)
    _, found, _ = cell(f"result = look_up({name!r})")
    assert found == []
    cell.close()


def test_control_a_plain_resolver_would_give_it(wall, world):
    """The name server of the world does answer so; what takes it out is ours."""
    code = LOOK_UP + f"print(look_up('private.example', server={next(iter(_servers()))!r}))"
    assert world.host.run("python3", "-c", code).strip() == str([0, [PRIVATE], False])


def _servers():
    from tests.world import resolvers

    return resolvers()


def test_a_flipping_name_reaches_nothing_local(wall, world, engine):
    """Rebinding: the first answer is public, the next one the metadata service."""
    cell = make(wall, engine, "--egress", "allow:flip.example")
    reached = set()
    for _ in range(4):
        for address in cell("result = look_up('flip.example')")[1]:
            reached.add((address, connect(cell, address)))
    assert (PUBLIC, True) in reached
    assert not any(address == METADATA for address, _ in reached)
    # Even told the address by other means, the dyno cannot connect: no name opens a denied range.
    seen = world.listeners.counts()
    assert not connect(cell, METADATA)
    assert world.listeners.counts() - seen == {}
    assert any(key[3] == "metadata" for key in cell.denied())
    cell.close()


def test_a_listed_name_with_a_private_address_stays_unreachable(wall, world, engine):
    cell = make(wall, engine, "--egress", "allow:private.example,mixed.example")
    cell("look_up('private.example'); look_up('mixed.example')")
    seen = world.listeners.counts()
    assert not connect(cell, PRIVATE)
    assert world.listeners.counts() - seen == {}
    cell.close()


def test_only_listed_names_resolve_and_no_other_is_forwarded(wall, world, engine):
    cell = make(wall, engine, "--egress", "allow:app.example,*.sub.app.example")
    assert not connect(cell, PUBLIC), "before anybody asked for the name, its address is closed"
    assert cell("result = look_up('app.example')") == [0, [PUBLIC], False]
    assert cell("result = look_up('deep.sub.app.example', tcp=True)") == [0, [PUBLIC2], False]
    assert connect(cell, PUBLIC)
    assert connect(cell, PUBLIC2)
    asked = len(world.names.asked)
    for name in ("secret-data.evil.example", "sub.app.example", "xapp.example", "app.example.evil.test"):
        for tcp in (False, True):
            assert cell(f"result = look_up({name!r}, tcp={tcp})") == [5, [], False], name
    assert world.names.asked[asked:] == [], "a question is a message to whoever owns the name"
    # And there is no other resolver to ask.
    assert cell("result = look_up('app.example', server='8.8.8.8')") == "TimeoutError"
    assert cell("result = look_up('evil.example', port=5300)") == "TimeoutError"
    assert ("udp", "8.8.8.8", 53, "not-listed") in cell.denied()
    cell.close()


def test_control_in_mode_public_the_same_question_is_forwarded(wall, world, engine):
    cell = make(wall, engine)
    cell("look_up('secret-data.evil.example')")
    assert "secret-data.evil.example" in world.names.asked
    cell.close()


def test_with_none_nothing_resolves_and_nothing_is_reached(wall, world, engine):
    cell = make(wall, engine, "--egress", "none")
    asked, seen = len(world.names.asked), world.listeners.counts()
    assert cell("result = look_up('app.example')") == "TimeoutError"
    assert cell("result = look_up('app.example', tcp=True)") == "TimeoutError"
    begin = time.monotonic()
    assert cell("""
try: socket.getaddrinfo('app.example', 80); result = 'resolved'
except OSError as error: result = 'not'
""") == "not"  # fmt: skip
    assert time.monotonic() - begin < 1, "refused at once, not after a time-out"
    assert not connect(cell, PUBLIC)
    assert world.names.asked[asked:] == []
    assert world.listeners.counts() - seen == {}
    denied = {(key[1], key[3]) for key in cell.denied()}
    assert {("172.16.0.23", "dns"), (PUBLIC, "egress-none")} <= denied
    cell.close()


def test_an_address_closes_when_its_answer_expires(wall, engine):
    """One second of TTL and two of grace; an open flow goes on, a new one does not."""
    cell = make(wall, engine, "--egress", "allow:brief.example")
    cell("look_up('brief.example')")
    assert connect(cell, PUBLIC)
    cell(f"flow = socket.create_connection(('{PUBLIC}', {PORT})); flow.settimeout(2); flow.recv(10)")
    time.sleep(3.5)
    assert not connect(cell, PUBLIC)
    assert cell("flow.send(b'x'); result = flow.recv(10).decode()") == "again\n"
    # Asked again, it opens again; and what is asked all the time stays open all the time.
    for _ in range(5):
        cell("look_up('brief.example')")
        assert connect(cell, PUBLIC)
        time.sleep(0.7)
    cell.close()


def test_one_dynos_names_open_nothing_for_another(wall, engine):
    asker, other = (
        make(wall, engine, "--egress", "allow:app.example"),
        make(wall, engine, "--egress", "allow:brief.example"),
    )
    asker("look_up('app.example')")
    assert connect(asker, PUBLIC)
    assert not connect(other, PUBLIC)
    asker.close()
    other.close()


def test_questions_are_limited_in_rate(wall, engine):
    cell = make(wall, engine)
    code = """
import time
query = bytes.fromhex("000701000001000000000000") + b"\\3app\\7example\\0\\0\\1\\0\\1"
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect(("172.16.0.23", 53)); s.settimeout(0.3)
for _ in range(1500): s.send(query)
got = 0
try:
    while True: s.recv(600); got += 1
except TimeoutError: pass
result = got
"""
    assert cell(code) <= 180
    assert cell.totals()["dns-rate"] > 1000
    cell.close()


def test_control_without_the_rate_more_are_answered(wall):
    cell = make(wall, "oci")
    code = "for _ in range(40):\n  for _ in range(20): look_up('app.example')\nresult = 1"
    with without(wall, rules=("@asked",)):
        cell(code)
    assert cell.totals()["dns-rate"] == 0
    cell.close()


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\0" * 11,
        b"\0" * 600,
        b"\xff" * 40,
        b"\0\7\1\0\0\1\0\0\0\0\0\0\xc0\x0c\0\1\0\1",
        b"\0\7\1\0\0\1\0\0\0\0\0\0" + b"\x3fa" * 200,
    ],
)
def test_odd_messages_do_not_end_the_resolver(wall, message):
    cell = make(wall, "oci", "--egress", "allow:app.example")
    cell(f"s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.sendto({message!r}, ('172.16.0.23', 53))")
    cell(
        f"t = socket.create_connection(('172.16.0.23', 53)); t.send(len({message!r}).to_bytes(2) + {message!r}); t.close()"
    )
    assert cell("result = look_up('app.example')") == [0, [PUBLIC], False]
    cell.close()


def test_a_changed_policy_reaches_questions_that_are_on_their_way(wall, world, engine):
    """An answer that comes after the policy changed opens nothing, and an open flow to the resolver is cut."""
    release = []

    def slow(asked: int):
        wait_for(lambda: release, 10, "the release")
        return [PUBLIC2], 60

    world.names.zone["slow.example"] = slow
    cell = make(wall, engine, "--egress", "allow:slow.example,app.example")
    cell("""
import threading
late = threading.Thread(target=lambda: answers.append(look_up('slow.example')))
answers = []; late.start()
""")
    wait_for(lambda: "slow.example" in world.names.asked, 5, "the question")
    assert wall("firewall", "set", cell.record["id"], "--egress", "allow:app.example").status == 0
    release.append(1)
    cell("late.join()")
    assert not connect(cell, PUBLIC2)
    assert PUBLIC2 not in router(wall, "nft", "list", "set", "inet", "sandbox", "named4")
    cell.close()


def test_one_socket_to_the_resolver_does_not_outlive_a_policy(wall, world, engine):
    """The kernel remembers where the first packet of a flow was sent; a change of policy makes it forget."""
    cell = make(wall, engine)
    cell("""
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect(("172.16.0.23", 53)); s.settimeout(1)
def ask_again(name):
    question = b"".join(bytes([len(p)]) + p.encode() for p in name.split(".")) + b"\\0" + struct.pack(">HH", 1, 1)
    s.send(struct.pack(">HHHHHH", 7, 0x100, 1, 0, 0, 0) + question)
    try: return s.recv(600)[3] & 15
    except OSError as error: return type(error).__name__
""")
    assert cell("result = ask_again('app.example')") == 0
    assert wall("firewall", "set", cell.record["id"], "--egress", "allow:brief.example").status == 0
    asked = len(world.names.asked)
    assert cell("result = ask_again('way-out.evil.example')") == 5
    assert world.names.asked[asked:] == []
    cell.close()


def test_connections_that_nobody_reads_do_not_use_up_the_guard(wall):
    """Questions are pipelined and answers never read: the connections end, and others are answered."""
    cell, other = make(wall, "oci", "--egress", "allow:app.example"), make(wall, "oci", "--egress", "allow:app.example")
    before = descriptors(wall)
    code = """
query = bytes.fromhex("000701000001000000000000") + b"\\x3f" + b"a" * 63 + b"\\x3f" + b"b" * 63 + b"\\4evil\\0\\0\\1\\0\\1"
held = []
for _ in range(40):
    t = socket.socket(); t.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1); t.settimeout(0.2)
    try:
        t.connect(("172.16.0.23", 53))
        for _ in range(1000): t.send(len(query).to_bytes(2) + query)
    except OSError: pass
    held.append(t)
result = len(held)
"""
    assert cell(code) == 40
    assert other("result = look_up('app.example', tcp=True)") == [0, [PUBLIC], False]
    wait_for(lambda: descriptors(wall) <= before + 5, 20, "the end of the connections")
    cell.close()
    other.close()


def descriptors(wall) -> int:
    return len(list(Path(f"/proc/{guard_pid(wall)}/fd").iterdir()))


def test_a_dead_resolver_is_started_again_and_nothing_opens_meanwhile(wall, world):
    cell = make(wall, "oci")
    listing = subprocess.run(
        ["pgrep", "-P", str(guard_pid(wall)), "-x", "dnsmasq"], capture_output=True, text=True, check=True
    )
    seen = world.listeners.counts()
    subprocess.run(["kill", "-9", *listing.stdout.split()], check=True)
    assert not connect(cell, PRIVATE)
    assert world.listeners.counts() - seen == {}
    wait_for(lambda: cell("result = look_up('app.example')") == [0, [PUBLIC], False], 10, "the resolver")
    cell.close()


def test_a_dead_guard_opens_nothing_and_the_next_command_starts_it(wall, world):
    cell = make(wall, "oci", "--egress", "allow:app.example")
    subprocess.run(["kill", "-9", str(guard_pid(wall))], check=True)
    time.sleep(0.2)
    seen = world.listeners.counts()
    assert cell("result = look_up('app.example')") in ("TimeoutError", "ConnectionRefusedError")
    assert not connect(cell, PUBLIC)
    assert world.listeners.counts() - seen == {}
    make(wall, "oci").close()
    assert cell("result = look_up('app.example')") == [0, [PUBLIC], False]
    cell.close()


def test_the_resolver_runs_as_nobody_without_rights(wall):
    cell = make(wall, "oci")
    pid = subprocess.run(
        ["pgrep", "-P", str(guard_pid(wall)), "-x", "dnsmasq"], capture_output=True, text=True, check=True
    ).stdout.strip()
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    assert set(status["Uid"].split()) == {"65534"}
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"].strip() == "1"
    assert len(records(wall)) == 1
    assert "172.16.0.23:53" in router(wall, "ss", "-lun")
    cell.close()


def test_a_host_whose_resolver_is_on_its_loopback(wall, world, tmp_path):
    """systemd-resolved's 127.0.0.53, in a mount namespace that says so: the host's own, which no dyno can reach."""
    world.names.serve(world.host, "127.0.0.53")
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.53\noptions edns0\n")
    wall("firewall", "remove")
    argv = wall.argv(
        "run", "--raw", "-q", "--engine", "oci", SHELL, "--", "python3", "-c", LOOK_UP + "print(look_up('app.example'))"
    )
    script = f'mount --bind {tmp_path}/resolv.conf /etc/resolv.conf && {argv[0]} {argv[1]} "$@"; s=$?; {" ".join(wall.argv("firewall", "remove"))}; exit $s'
    done = subprocess.run(
        ["unshare", "-m", "--propagation", "private", "sh", "-c", script, "sh", *argv[2:]],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == str([0, [PUBLIC], False]), done
