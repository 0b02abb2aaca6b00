"""The policy as a value, and what it compiles to; golden files keep every byte of both requests in sight."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.errors import PolicyError, UsageError
from sandbox.policy import docker_body, oci, policy, seccomp, sizes
from sandbox.policy.clauses import Clause, parse_waivers
from sandbox.policy.spec import ContainerSpec, SlotPaths
from sandbox.units import GIB, MIB

GOLDEN = Path(__file__).parent / "golden"


def make(size="standard-1x", **more):
    return policy.make(sizes.find(size), **{"host_memory_bytes": 64 * GIB, "swap": False, **more})


def spec(**more) -> ContainerSpec:
    values = {
        "container_id": "sbx-01234567-89abcdef",
        "hostname": "web-1",
        "command": ("/bin/bash", "--login", "-c", "gunicorn app:app"),
        "policy": make(),
        "paths": SlotPaths(root="/r/root", app="/r/app", disk="/r/disk", fixed="/r/fixed"),
        "uid_base": 0x70000000,
        "userns_path": "/proc/1/fd/9",
        "cgroup": "/sbx-01234567-89abcdef",
        "stack_image": "sandbox-stack:0",
    }
    return ContainerSpec(**{**values, **more})


@pytest.mark.parametrize(("name", "document"), [("oci", oci.config), ("docker", docker_body.create_body)])
def test_what_an_engine_is_asked_for(name, document):
    """To accept a change, write ``actual`` over the golden file, and read the difference in the commit."""
    actual = json.dumps(document(spec()), indent=1, sort_keys=True) + "\n"
    path = GOLDEN / f"{name}.json"
    assert actual == path.read_text()


def test_one_policy_both_engines():
    """Every limit of the OCI configuration stands in Docker's body too."""
    config, body = oci.config(spec()), docker_body.create_body(spec())["HostConfig"]
    resources = config["linux"]["resources"]
    assert body["Memory"] == resources["memory"]["limit"] == GIB - 4096
    assert body["MemorySwap"] == resources["memory"]["swap"]
    assert body["PidsLimit"] == resources["pids"]["limit"] == 256
    assert body["CpuShares"] == resources["cpu"]["shares"]
    assert body["CpuQuota"] == resources["cpu"]["quota"]
    assert json.loads(body["SecurityOpt"][1].removeprefix("seccomp=")) == config["linux"]["seccomp"]
    assert body["MaskedPaths"] == config["linux"]["maskedPaths"]
    assert {limit["Name"] for limit in body["Ulimits"]} == {a.split("=")[0].strip("-") for a in oci.shim_limits(make())}


def test_herokus_figures():
    """RAM, processes and kill limit of the table in HEROKU.md 2.4."""
    rows = {
        "eco": (512 * MIB, 256, 2.0),
        "basic": (512 * MIB, 256, 2.0),
        "standard-1x": (512 * MIB, 256, 2.0),
        "standard-2x": (GIB, 512, 2.0),
        "performance-m": (2560 * MIB, 16384, 2.0),
        "performance-l": (14 * GIB, 32768, 2.0),
        "performance-l-ram": (30 * GIB, 16384, 1.2),
        "performance-xl": (62 * GIB, 32768, 1.2),
        "performance-2xl": (126 * GIB, 65536, 1.2),
    }
    for name, (memory, pids, factor) in rows.items():
        size = sizes.find(name)
        assert (size.memory_bytes, size.pids) == (memory, pids)
        assert size.kill_bytes / memory == pytest.approx(factor, rel=0.01)


def test_with_swap_the_quota_is_the_memory_limit():
    with_swap, without = make(swap=True), make()
    assert (with_swap.memory_max_bytes, with_swap.memory_swap_max_bytes) == (512 * MIB, GIB)
    # Not (GIB, GIB): a swap limit of 0 does not outlive a reload of systemd.
    assert (without.memory_max_bytes, without.memory_swap_max_bytes) == (GIB - 4096, GIB)


def test_overrides_go_down_only():
    assert make(memory_bytes=128 * MIB).memory_kill_bytes == 256 * MIB
    for bad in (
        {"memory_bytes": GIB},
        {"memory_bytes": MIB},
        {"pids": 257},
        {"pids": 1},
        {"cpus": 2.0},
        {"cpus": 0.0},
        {"disk_bytes": 2 * GIB},
    ):
        with pytest.raises(PolicyError, match="is not between"):
            make(**bad)


def test_a_size_above_the_hosts_memory_is_refused():
    with pytest.raises(PolicyError, match=r"needs 14 GiB of memory, this host has 4 GiB"):
        make("performance-l", host_memory_bytes=4 * GIB)


def test_a_waived_clause_is_not_asked_for_and_changes_the_digest():
    waived = make(waived=frozenset({Clause.PIDS, Clause.CPU, Clause.MEMORY, Clause.DEVICES}))
    assert oci.config(spec(policy=waived))["linux"]["resources"] == {}
    assert "PidsLimit" not in docker_body.create_body(spec(policy=waived))["HostConfig"]
    assert waived.digest() != make().digest()


def test_the_digest_is_stable_and_covers_every_override():
    assert make().digest() == make().digest()
    digests = {
        make(**more).digest()
        for more in ({}, {"pids": 100}, {"cpus": 0.5}, {"memory_bytes": 64 * MIB}, {"disk_bytes": 64 * MIB})
    }
    assert len(digests) == 5


def test_unknown_names_list_those_there_are():
    with pytest.raises(UsageError) as error:
        sizes.find("huge")
    assert "standard-2x" in error.value.hint
    with pytest.raises(UsageError) as error:
        parse_waivers(["everything"])
    assert "seccomp" in error.value.hint


def matches(conditions, value: int) -> int:
    return sum((value & condition.mask) == condition.value for condition in conditions)


@given(st.sets(st.integers(0, 2**32 - 1), min_size=1, max_size=6), st.integers(0, 2**64 - 1))
def test_all_but_covers_exactly_the_complement(refused, value):
    """On the low word, whatever the high one holds: exactly one condition, or none for a refused value."""
    conditions = seccomp.all_but(0, refused)
    assert matches(conditions, value) == (0 if value & 0xFFFFFFFF in refused else 1)
    for each in refused:
        assert matches(conditions, each) == matches(conditions, (7 << 32) | each) == 0


@given(st.sets(st.integers(0, 127), max_size=4), st.integers(0, 2**32 - 1))
def test_all_but_in_a_few_bits_allows_nothing_above_them(refused, value):
    assert matches(seccomp.all_but(0, refused, bits=7), value) == (1 if value < 128 and value not in refused else 0)


def test_no_call_is_both_allowed_outright_and_by_value():
    """Libseccomp would let the unconditional rule win without a word."""
    outright = {call for rule in seccomp.rules() if not rule.args for call in rule.calls}
    by_value = {call for rule in seccomp.rules() if rule.args for call in rule.calls}
    assert not outright & by_value
    assert not {"ptrace", "mount", "bpf", "unshare", "setns", "keyctl", "io_setup", "userfaultfd"} & (
        outright | by_value
    )


def test_every_argument_comparison_masks_the_low_word():
    for rule in seccomp.rules():
        for arg in rule.args:
            assert arg.mask <= 0xFFFFFFFF
            assert arg.value & ~arg.mask == 0
