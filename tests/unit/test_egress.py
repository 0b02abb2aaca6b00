"""The egress of a dyno as a value: what is accepted, what is refused with which words, and what never overlaps."""

from __future__ import annotations

import ipaddress
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.app import appconfig
from sandbox.app import source as sources
from sandbox.config import Config
from sandbox.errors import AppError, PolicyError, UsageError
from sandbox.policy import egress
from sandbox.policy.egress import Mode, Network, Reason
from sandbox.supervisor import egress as wishes

BAD = {
    "pubic": ("there is no egress mode", "modes: public, none, or allow"),
    "": ("there is no egress mode", "modes:"),
    "allow": ("has an empty list", "none"),
    "allow:": ("has an empty list", "none"),
    "public:api.example.com": ("a list goes with mode allow", "leave one"),
    "allow:93.184.216.0/33": ("is not an IPv4 network", "ADDRESS/PREFIX"),
    "allow:93.184.216.7/24": ("is not an IPv4 network", "ADDRESS/PREFIX"),
    "allow:93.184.216": ("is not an IPv4 network", "ADDRESS/PREFIX"),
    "allow:93.184.216.34:0": ("is not between 1 and 65535", ""),
    "allow:93.184.216.34:70000": ("is not between 1 and 65535", ""),
    "allow:93.184.216.34:443-80": ("is not between 1 and 65535", ""),
    "allow:93.184.216.34:http": ("is not a port", "443"),
    "allow:93.184.216.34:": ("is not a port", "443"),
    "allow:https://api.example.com": ("has a scheme", "host name alone"),
    "allow:api.example.com:443": ("ports go with networks", "name alone"),
    "allow:api.example.com/v1": ("neither an IPv4 network nor a domain name", "api.example.com"),
    "allow:*": ("a wildcard stands for the leftmost labels only", "*.example.com"),
    "allow:api.*.com": ("a wildcard stands for the leftmost labels only", "*.example.com"),
    "allow:*example.com": ("a wildcard stands for the leftmost labels only", "*.example.com"),
    "allow:*.com": ("neither an IPv4 network nor a domain name", ""),
    "allow:localhost": ("neither an IPv4 network nor a domain name", ""),
    "allow:-a.example.com": ("neither an IPv4 network nor a domain name", ""),
    "allow:a..example.com": ("neither an IPv4 network nor a domain name", ""),
    "allow:\u0430pi.example.com": ("neither an IPv4 network nor a domain name", "xn--"),
    "allow:x y.example.com": ("neither an IPv4 network nor a domain name", ""),
    "allow:2606:2800::1": ("is not an IPv4 network", "IPv6 is denied as a whole"),
    "allow:[::1]:80": ("is not an IPv4 network", "IPv6 is denied as a whole"),
    "allow:10.1.2.3/32:5432": (
        "lies in 10.0.0.0/8, which is always denied (private)",
        "the operator can permit it: permit = ",
    ),
    "allow:169.254.169.254": ("lies in 169.254.169.254/32, which is always denied (metadata)", "permit"),
    "allow:127.0.0.1": ("always denied (loopback)", "permit"),
    "allow:@/no/such/file": ("cannot be read: No such file", ""),
}


@pytest.mark.parametrize("text", BAD)
def test_bad_wishes_say_what_and_what_to_do(text, tmp_path):
    with pytest.raises((PolicyError, UsageError)) as caught:
        wishes.wish(Config(str(tmp_path), str(tmp_path)), text)
    assert BAD[text][0] in caught.value.message
    assert BAD[text][1] in (caught.value.hint or "")
    assert "\n" not in caught.value.message


def test_good_wishes(tmp_path):
    config = Config(str(tmp_path), str(tmp_path))
    assert wishes.wish(config, "public").mode is Mode.PUBLIC
    assert wishes.wish(config, "none") == egress.NOTHING
    found = wishes.wish(config, "allow:93.184.216.0/24:80,443,8000-8100,API.Example.COM.,*.cdn.example", smtp=True)
    assert [str(network) for network in found.networks] == ["93.184.216.0/24:80,443,8000-8100"]
    assert found.names == ("*.cdn.example", "api.example.com")
    assert found.smtp
    listed = tmp_path / "list"
    listed.write_text("# one a line\n93.184.216.34/32:443\n\napi.example.com # ours\n")
    found = wishes.wish(config, f"allow:@{listed}")
    assert (len(found.networks), found.names) == (1, ("api.example.com",))


def test_a_huge_list_is_refused_with_its_size(tmp_path):
    listed = tmp_path / "list"
    listed.write_text("".join(f"93.{n >> 16}.{n >> 8 & 255}.{n & 255}/32:{n % 7 + 1}\n" for n in range(100_000)))
    with pytest.raises(PolicyError, match="has 100000 entries, ranges of ports counted, at most 1000"):
        wishes.wish(Config(str(tmp_path), str(tmp_path)), f"allow:@{listed}")
    listed.write_text("93.184.216.0/24:" + ",".join(str(port) for port in range(1, 60000, 2)))
    with pytest.raises(PolicyError, match="has 30000 entries, ranges of ports counted"):
        wishes.wish(Config(str(tmp_path), str(tmp_path)), f"allow:@{listed}")
    listed.write_text("".join(f"93.{n >> 16}.{n >> 8 & 255}.{n & 255}/32\n" for n in range(65536)))
    assert len(wishes.wish(Config(str(tmp_path), str(tmp_path)), f"allow:@{listed}").networks) == 1, (
        "neighbours become one network"
    )


def test_a_larger_network_stands_and_its_denied_parts_stay_denied():
    found = egress.make("allow", ["0.0.0.0/0:443"])
    assert len(found.networks) == 1
    assert found.permitted == ()


def test_the_operator_permits_exactly_what_the_entry_covers():
    permit = [egress.parse_network("10.1.2.0/24:5432", where="permit")]
    assert egress.make("allow", ["10.1.2.3/32:5432"], permit=permit).permitted
    for entry in ("10.1.2.3/32", "10.1.2.3/32:5433", "10.1.3.3/32:5432", "10.1.0.0/16:5432"):
        with pytest.raises(PolicyError, match="always denied"):
            egress.make("allow", [entry], permit=permit)


def test_names_on_a_list():
    names = ("api.example.com", "*.cdn.example")
    for name in ("api.example.com", "a.cdn.example", "b.a.cdn.example"):
        assert egress.name_allowed(name, names)
    for name in ("cdn.example", "xapi.example.com", "example.com", "a.api.example.com", "api.example.com.evil", ""):
        assert not egress.name_allowed(name, names)


def test_the_telling_reason_wins():
    ranges = egress.denied_ranges(pool="172.16.0.0/16", hosts=["192.168.1.2", "81.2.69.142"], deny=[Network(1, 2)])
    for address, reason in {
        "192.168.1.2": Reason.HOST, "192.168.1.3": Reason.PRIVATE, "81.2.69.142": Reason.HOST, "172.16.9.9": Reason.DYNO,
        "172.31.0.1": Reason.PRIVATE, "169.254.169.254": Reason.METADATA, "169.254.0.1": Reason.LINK_LOCAL,
        "100.100.100.200": Reason.METADATA, "224.0.0.1": Reason.MULTICAST, "255.255.255.255": Reason.BROADCAST,
        "240.0.0.1": Reason.RESERVED, "93.184.216.34": None, "8.8.8.8": None, "11.0.0.0": None, "9.255.255.255": None,
    }.items():  # fmt: skip
        assert egress.reason_of(address, ranges) is reason, address


def test_every_special_address_that_python_knows_is_denied():
    """Another list than ours: ``is_global`` of the standard library, at both ends of each of its ranges."""
    ranges = egress.denied_ranges()
    for item in ipaddress.IPv4Address("10.0.0.1")._constants._private_networks:
        for address in (item.network_address, item.broadcast_address):
            assert egress.reason_of(str(address), ranges) is not None, address


networks = st.builds(
    lambda first, size, ports: Network(first, min(first + size, 2**32 - 1), ports),
    st.integers(2**24, 2**24 + 300), st.integers(0, 60),
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 9)).map(lambda p: (p[0], p[0] + p[1])), min_size=1, max_size=3).map(tuple),
)  # fmt: skip


@given(st.lists(networks, max_size=12))
def test_disjoint_means_the_same_and_never_overlaps(items):
    found = egress.disjoint(items)
    for one, other in itertools.pairwise(found):
        assert one.last < other.first
    for address in range(2**24 - 2, 2**24 + 365):
        for port in (1, 7, 25, 50, 59):

            def covers(item, address=address, port=port):
                return item.first <= address <= item.last and any(low <= port <= high for low, high in item.ports)

            assert any(map(covers, items)) == any(map(covers, found))


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 900)), max_size=30))
def test_denied_ranges_are_disjoint_and_keep_the_first_reason(spans):
    deny = [Network(first, first + size) for first, size in spans]
    ranges = egress.denied_ranges(deny=deny)
    for one, other in itertools.pairwise(ranges):
        assert one.last < other.first
    for first, size in spans:
        for value in (first, first + size):
            assert egress.reason_of(str(ipaddress.IPv4Address(value)), ranges) is not None


@given(st.text(max_size=60))
def test_any_text_is_an_entry_or_an_error(text):
    try:
        found = egress.parse_entry(text, where="x")
    except PolicyError:
        return
    if isinstance(found, str):
        assert set(found) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.*")
    else:
        assert 0 <= found.first <= found.last < 2**32


APP_FILES = {
    "egress = 7": "egress must be of type str",
    "allow = 'x'": "allow must be of type list",
    "allow = [1]": "allow must be a list of text",
    "egres = 'public'": 'unknown key "egres"',
    "egress = 'public'\nallow = ['a.example.com']": 'allow goes with egress = "allow"',
    "egress = [": "Invalid",
    "x" * 200_000: "has more than",
}


@pytest.mark.parametrize("text", APP_FILES)
def test_bad_app_files_name_the_file_and_the_key(text, tmp_path):
    (tmp_path / "sandbox.toml").write_text(text)
    with pytest.raises(AppError) as caught:
        appconfig.read(sources.scan(str(tmp_path)))
    assert APP_FILES[text] in caught.value.message
    assert "sandbox.toml" in caught.value.message


def test_good_app_files(tmp_path):
    (tmp_path / "Procfile").write_text("web: x\n")
    assert appconfig.read(sources.scan(str(tmp_path))) == appconfig.AppConfig()
    (tmp_path / "sandbox.toml").write_text("allow = ['a.example.com']\nsmtp = true\n")
    assert appconfig.read(sources.scan(str(tmp_path))) == appconfig.AppConfig("allow", ("a.example.com",), smtp=True)
