"""The pure parts of the network wall: messages of hostile servers, packets of hostile apps, and the rules' text."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.config import Config
from sandbox.firewall import denied, dns, guard, names, ruleset
from sandbox.firewall.layout import Layout, link_name
from sandbox.host import nfnetlink
from sandbox.policy import egress, sizes

LAYOUT = Layout(Config("/s", "/r"))


def query(name: str, kind: int = 1) -> bytes:
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
    return struct.pack(">6H", 7, 0x100, 1, 0, 0, 0) + labels + b"\0" + struct.pack(">2H", kind, 1)


def test_a_question_is_read():
    found = dns.question(query("API.Example.com", 28))
    assert (found.id, found.name, found.type) == (7, "api.example.com", 28)


def test_addresses_behind_an_alias_are_found():
    asked = query("www.example.com")
    alias = struct.pack(">HHHIH", 0xC00C, 5, 1, 60, 4) + b"\1a\xc0\x10"
    address = struct.pack(">HHHIH", 0xC00C, 1, 1, 30, 4) + bytes([93, 184, 216, 34])
    huge = struct.pack(">HHHIH", 0xC00C, 1, 1, 0x80000001, 4) + bytes([93, 184, 216, 35])
    answer = asked[:6] + struct.pack(">H", 3) + asked[8:] + alias + address + huge
    assert dns.addresses(answer) == [dns.Address("93.184.216.34", 30), dns.Address("93.184.216.35", 0)]


def test_our_own_answers_can_be_read_back():
    asked = dns.question(query("a.example.com"))
    reply = dns.reply(query("a.example.com"), asked, dns.NOERROR, answers=(dns.Address("10.1.2.3", 60),))
    assert dns.addresses(reply) == [dns.Address("10.1.2.3", 60)]
    assert reply[3] & 15 == 0
    assert dns.reply(query("a.example.com"), asked, dns.REFUSED)[3] & 15 == 5


@pytest.mark.parametrize("message", [
    b"", query("a.b")[:-1], query("a.b")[:2] + b"\x80" + query("a.b")[3:], b"\0\7\1\0\0\1\0\0\0\0\0\0\xc0\x0c\0\1\0\1",
    b"\0\7\1\0\0\1\0\0\0\0\0\0" + b"\x3f" + b"a" * 63 + b"\x3f" + b"a" * 63 + b"\x3f" + b"a" * 63 + b"\x3f" + b"a" * 63 + b"\0\0\1\0\1",
    b"\0\7\1\0\0\1\0\0\0\0\0\0\3a.b\0\0\1\0\1", b"\0\7\1\0\0\2\0\0\0\0\0\0\1a\0\0\1\0\1",
])  # fmt: skip
def test_odd_questions_are_refused(message):
    with pytest.raises(ValueError):
        dns.question(message)


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(data):
    for reader in (dns.question, dns.addresses):
        try:
            reader(data)
        except ValueError:
            continue
    assert isinstance(guard.describe(data), str)
    nfnetlink.parse_log(data)
    nfnetlink.parse_change(data)


@given(st.binary(min_size=12, max_size=200), st.integers(1, 40))
def test_any_answer_to_our_question_is_read_or_refused(tail, count):
    try:
        dns.addresses(query("a.example.com")[:6] + struct.pack(">H", count) + query("a.example.com")[8:] + tail)
    except ValueError:
        pass


def test_a_packet_in_words():
    head = bytes([0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0, 172, 16, 0, 6, 10, 0, 0, 5])
    assert guard.describe(head + struct.pack(">HH", 40000, 5432)) == "tcp 10.0.0.5:5432"
    assert guard.describe(head[:9] + b"\1" + head[10:] + bytes(8)) == "icmp 10.0.0.5"
    six = bytes([0x60, 0, 0, 0, 0, 20, 17, 64]) + bytes(15) + b"\1" + bytes(15) + b"\2" + struct.pack(">HH", 1, 53)
    assert guard.describe(six) == "udp [::2]:53"
    assert guard.rule_of(3) == "metadata"
    assert guard.rule_of(250) == "250"


def test_the_rules_do_not_depend_on_who_is_admitted():
    text, rules = ruleset.router(LAYOUT, egress.denied_ranges(pool=LAYOUT.config.pool), ["192.0.2.1"])
    assert "type filter hook" not in rules
    assert "goto deny" not in text, "no rule before the sets are published"
    wish = egress.make("allow", ["93.184.216.34/32:443", "api.example.com"])
    items = ruleset.elements("sbx-12345678", LAYOUT.place(7), wish, sizes.find("1x").traffic, 5000)
    assert {item.set for item in items} <= {
        line.split()[1] for line in text.splitlines() if line.startswith(("  set ", "  map "))
    }
    assert "api.example.com" not in ruleset.add(items), "a name is never text of a rule"
    assert ruleset.remove(items).count("delete element") == len(items)
    assert [line.split()[0] for line in ruleset.replace(items[0]).splitlines()] == ["add", "delete", "add"]


def test_a_growing_set_never_decides_alone():
    """A full set ends its rule: only sets with one key per dyno may share a rule with a verdict."""
    _, rules = ruleset.router(LAYOUT, egress.denied_ranges(), [])
    assert len(rules.splitlines()) > 50
    for line in rules.splitlines():
        if "update @" in line or "add @" in line:
            grows = any(word in line for word in ("ip daddr", "ip6 daddr", "ip saddr"))
            assert not (grows and line.rstrip().endswith(("drop", "deny", "log_drop", "accept", "return"))), line


def test_places_of_the_pool():
    place = LAYOUT.place(1)
    assert (str(place.gateway), str(place.interface)) == ("172.16.0.5", "172.16.0.6/30")
    assert len(list(LAYOUT.numbers())) == 16383
    assert LAYOUT.places == 16382, "the uplink and the resolver have a /30 each"
    assert link_name("sbx-aabbccdd-12345678") == "sbx-12345678"
    small = Layout(Config("/s", "/r", pool="10.9.0.0/28"))
    assert [str(small.place(n).address) for n in small.numbers()] == ["10.9.0.6", "10.9.0.10", "10.9.0.14"]


def test_the_resolvers_configuration_names_every_private_range():
    text = names.dnsmasq_config(egress.denied_ranges(pool="172.16.0.0/16"))
    for network in ("10.0.0.0/8", "172.16.0.0/12", "100.64.0.0/10", "198.18.0.0/15", "169.254.0.0/16"):
        assert f"bogus-nxdomain={network}\n" in text


def test_the_hosts_resolvers_are_read(tmp_path):
    (tmp_path / "resolv.conf").write_text(
        "# c\nnameserver 127.0.0.53\nnameserver fe80::1%eth0\nsearch x\nnameserver 1.2.3.4\nnameserver 5.6.7.8\n"
    )
    assert names.host_resolvers(str(tmp_path / "resolv.conf")) == ["127.0.0.53", "fe80::1"], (
        "the first two: each is waited for"
    )
    assert names.host_resolvers("/no/such/file") == []


def test_changes_of_elements_are_daily_business_but_not_of_what_is_denied():
    def message(kind: int, body: bytes) -> bytes:
        return struct.pack("=IHHII", 20 + len(body), 10 << 8 | kind, 0, 0, 0) + bytes(4) + body

    def attribute(kind: int, data: bytes) -> bytes:
        return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)

    generation = message(15, attribute(2, struct.pack(">I", 42)) + attribute(3, b"nft\0"))
    daily = nfnetlink.parse_change(message(12, attribute(2, b"src4\0")) + generation)
    assert daily == nfnetlink.Change(rules=False, pid=42, program="nft")
    assert nfnetlink.parse_change(message(14, attribute(2, b"deny4\0")) + generation).rules
    assert nfnetlink.parse_change(message(8, b"") + generation).rules


def test_protocols_by_name_and_number():
    assert denied._protocol("tcp") == "tcp"
    assert denied._protocol(132) == "sctp"
    assert denied._protocol("47") == "gre"
