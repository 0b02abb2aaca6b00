"""The cgroup reader on a folder that looks like each version's files: same answers, absent is never unlimited."""

from __future__ import annotations

import os
import select

import pytest

from sandbox.host import cgroup
from sandbox.host.cgroup import Cgroup

V2 = {
    "memory.max": "1073741824",
    "memory.swap.max": "0",
    "pids.max": "256",
    "cpu.max": "100000 100000",
    "cpu.weight": "39",
    "memory.current": "5000",
    "memory.swap.current": "7",
    "memory.peak": "6000",
    "memory.stat": "anon 3000\nfile 1500\nkernel 500",
    "memory.events": "low 0\nhigh 0\nmax 4\noom 2\noom_kill 1\noom_group_kill 0",
    "pids.current": "3",
    "pids.peak": "9",
    "pids.events": "max 2",
    "cpu.stat": "usage_usec 123456\nuser_usec 1",
    "cgroup.procs": "",
}
V1 = {
    "memory.limit_in_bytes": "1073741824",
    "memory.memsw.limit_in_bytes": "9223372036854771712",
    "memory.kmem.tcp.limit_in_bytes": "67108864",
    "memory.kmem.tcp.usage_in_bytes": "11",
    "pids.max": "max",
    "cpu.cfs_quota_us": "-1",
    "cpu.cfs_period_us": "100000",
    "cpu.shares": "1024",
    "devices.list": "c 1:3 rwm\nc 1:5 rwm",
    "memory.usage_in_bytes": "5000",
    "memory.memsw.usage_in_bytes": "5007",
    "memory.max_usage_in_bytes": "6000",
    "memory.stat": "total_rss 3000\ntotal_cache 1500",
    "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 1",
    "pids.current": "3",
    "pids.peak": "9",
    "pids.events": "max 2",
    "cpuacct.usage": "123456000",
}


def fake(tmp_path, files: dict[str, str], *, v2: bool) -> Cgroup:
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    keys = ("",) if v2 else ("memory", "pids", "cpu", "cpuacct", "devices")
    group = Cgroup(dict.fromkeys(keys, str(tmp_path)))
    group.is_v2 = v2
    return group


def test_v2(tmp_path, monkeypatch):
    monkeypatch.setattr(cgroup, "device_programs", lambda _: 1)
    group = fake(tmp_path, V2, v2=True)
    limits, usage = group.limits(), group.usage()
    assert (limits.memory_bytes, limits.memory_swap_bytes, limits.pids) == (1 << 30, 1 << 30, 256)
    assert (limits.cpu_quota_us, limits.cpu_period_us, limits.cpu_shares) == (
        100_000,
        100_000,
        cgroup.shares_to_weight(1024),
    )
    assert limits.devices == ("bpf 1",)
    assert (usage.memory_bytes, usage.rss_bytes, usage.cache_bytes, usage.swap_bytes) == (5000, 3000, 1500, 7)
    assert (usage.memory_peak_bytes, usage.pids_peak, usage.pids_refused) == (6000, 9, 2)
    assert (usage.cpu_us, usage.oom_kills) == (123_456, 1)


def test_v2_unlimited_and_absent_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(cgroup, "device_programs", lambda _: None)
    limits = fake(tmp_path, {**V2, "memory.max": "max", "cpu.max": "max 100000"}, v2=True).limits()
    assert (limits.memory_bytes, limits.memory_swap_bytes, limits.cpu_quota_us) == (-1, -1, -1)
    (tmp_path / "memory.swap.max").unlink()
    (tmp_path / "pids.max").unlink()
    limits = fake(tmp_path, {}, v2=True).limits()
    assert (limits.memory_swap_bytes, limits.pids, limits.devices) == (None, None, None)


def test_v2_tells_of_an_oom_kill_as_it_happens(tmp_path):
    group = fake(tmp_path, V2, v2=True)
    event = group.oom_event()
    try:
        assert select.select([event], [], [], 0)[0] == []
        (tmp_path / "memory.events").write_text("oom_kill 2\n")
        assert select.select([event], [], [], 5)[0] == [event]
    finally:
        os.close(event)


def test_v1(tmp_path):
    group = fake(tmp_path, V1, v2=False)
    limits, usage = group.limits(), group.usage()
    assert (limits.memory_bytes, limits.memory_swap_bytes, limits.tcp_bytes) == (1 << 30, -1, 64 << 20)
    assert (limits.pids, limits.cpu_quota_us, limits.cpu_shares) == (-1, -1, 1024)
    assert limits.devices == ("c 1:3 rwm", "c 1:5 rwm")
    assert (usage.memory_bytes, usage.swap_bytes, usage.memory_peak_bytes) == (5011, 7, 6000)
    assert (usage.cpu_us, usage.oom_kills, usage.pids_refused) == (123_456, 1, 2)


@pytest.mark.parametrize(("shares", "weight"), [(2, 1), (1024, 39), (2048, 79), (262144, 10000)])
def test_shares_become_weights_as_every_runtime_does_it(shares, weight):
    assert cgroup.shares_to_weight(shares) == weight
