"""Mutants: twins with one clause of the wall taken out. A check that none of them turns red may be blind.

Each names the rows that must turn red, and those that may (where one clause is seen by several rows). Any other red
row is a sloppy check, and is reported as such.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from typing import Any, NamedTuple

from sandbox.report import weaken
from sandbox.report.session import QUICK
from sandbox.report.twin import NONE, Twin, Wanted, Weakness
from sandbox.units import MIB

Json = dict[str, Any]


class Mutant(NamedTuple):
    """``turns``: rows that must turn red; ``may``: rows that may. ``live`` weakens the twin after it has started.

    ``limits``: experiments of session.limits to run; ``network``: whether packets are sent; ``host``: files of the
    host that read otherwise, in a mount namespace of ours. ``engines``: where the clause exists.
    """

    name: str
    says: str
    turns: str
    may: str = ""
    weakness: Weakness = NONE
    live: Callable[[Twin], None] | None = None
    groups: tuple[str, ...] = QUICK
    limits: tuple[str, ...] = ()
    network: bool = False
    vanish: bool = False  # the rules are deleted at the end, and packets sent once more
    host: tuple[tuple[str, str], ...] = ()  # (path, content)
    engines: tuple[str, ...] = ("oci", "docker")
    gentle: bool = False
    needs: str = ""  # a path without which the clause does not exist on a host

    @property
    def rules(self) -> bool:
        """Whether the twins' router is another one afterwards."""
        return "NET-" in self.turns or "RES-17" in self.turns

    def impossible(self, wanted: Wanted) -> str:
        """Why this host cannot make the mutant; an empty text when it can."""
        for path in (*dict(self.host), self.needs):
            if path and not os.path.exists(path):
                return f"this kernel has no {path}"
        for limit in self.weakness.policy(wanted.policy).rlimits:
            hard = resource.getrlimit(getattr(resource, f"RLIMIT_{limit.name}"))[1]
            if 0 <= hard < limit.hard:
                return f"this host's own {limit.name} is {hard} and cannot be raised"
        return ""

    @property
    def must(self) -> frozenset[str]:
        return frozenset(self.turns.split())

    @property
    def allowed(self) -> frozenset[str]:
        return frozenset((*self.turns.split(), *self.may.split()))


# Rows of calls that pass a filter when nothing else stands before them.
_ALL_CALLS = "PRV-16 PRV-17 PRV-18 KRN-01 KRN-02 KRN-05 KRN-07 KRN-08 KRN-09 KRN-10 KRN-11 KRN-12 KRN-13 KRN-14 KRN-15 KRN-16 KRN-17 KRN-18 KRN-19 KRN-20 KRN-21 KRN-22 KRN-23 KRN-24 KRN-25 KRN-26 KRN-27 FS-04 FS-23 FS-26 NET-09 NET-11 NET-12 NET-13 NET-25 NET-27 PRV-09 PRV-10 PRV-11 PRV-12 PRV-13 PRV-14 PRV-27 RES-14"
_NET_K = "NET-29"
_WALLED = "NET-01 NET-02 NET-03 NET-04 NET-05 NET-06 NET-07 NET-08 NET-10 NET-17 NET-19 NET-21 NET-22 NET-24 NET-26 NET-28 NET-29 NET-30"

ALL: tuple[Mutant, ...] = (
    Mutant("bare", "no wall but namespaces and cgroup; root with every right", "PRV-01 PRV-02 PRV-03 PRV-10 FS-08",
           may="*", weakness=Weakness(oci=weaken.bare_oci, docker=weaken.bare_docker), gentle=True),
    Mutant("no-seccomp", "no system-call filter", "PRV-10 PRV-11 PRV-13 PRV-16 KRN-22 NET-13 NET-12 KRN-01",
           may=_ALL_CALLS + " PRV-15 PRV-28",
           weakness=Weakness(oci=lambda d: weaken.linux(d).pop("seccomp"), docker=weaken.no_seccomp_docker)),
    Mutant("more-calls", "the filter lets a few dangerous calls pass", "PRV-10 KRN-05 KRN-10 KRN-11 KRN-14 PRV-17",
           may="PRV-18 KRN-13 KRN-25 KRN-24",
           weakness=weaken.allow("setns", "userfaultfd", "bpf", "keyctl", "add_key", "request_key", "ptrace")),
    Mutant("clone-flags", "the filter looks at no clone flags", "PRV-10 KRN-01 KRN-02",
           weakness=weaken.seccomp(weaken.no_flag_checks)),
    Mutant("high-bits", "the filter passes values with high bits", "PRV-10 PRV-14 PRV-27",
           may="NET-12 NET-27 NET-09", weakness=weaken.seccomp(weaken.high_bits)),
    Mutant("foreign-calls", "the filter covers 32-bit and x32 calls instead of ending them", "PRV-10 PRV-11 PRV-13 PRV-12",
           may="NET-09 NET-11 NET-12 NET-13 NET-25 NET-27 PRV-14 KRN-12", weakness=weaken.seccomp(weaken.foreign)),
    Mutant("socket-families", "the filter passes every kind of socket", "PRV-10 NET-12 NET-13 NET-27",
           may="NET-09 NET-11 NET-25 PRV-14", weakness=weaken.seccomp(weaken.families)),
    Mutant("call-arguments", "the filter looks at no socket options, ioctls and personalities",
           "PRV-10 PRV-16 PRV-27 KRN-12", may="PRV-14", weakness=weaken.seccomp(weaken.options)),
    Mutant("file-modes", "the filter looks at no file modes", "PRV-10 PRV-09 FS-04 RES-14", weakness=weaken.seccomp(weaken.modes)),
    Mutant("cap-net-raw", "one capability", "PRV-01", may="PRV-08 NET-15 NET-11", weakness=weaken.capabilities("NET_RAW")),
    Mutant("cap-sys-admin", "the capability that is nearly root", "PRV-01", may="PRV-08 NET-15 KRN-19 KRN-20 PRV-25",
           weakness=weaken.capabilities("SYS_ADMIN")),
    Mutant("no-nnp", "programs may gain rights", "PRV-02",
           weakness=Weakness(oci=weaken.process(noNewPrivileges=False),
                             docker=lambda b: b["HostConfig"].update(
                                 SecurityOpt=[o for o in b["HostConfig"]["SecurityOpt"] if o != "no-new-privileges"]))),
    Mutant("uid-0", "runs as its namespace's root", "PRV-03 IDN-02 PRV-05", may="RES-11 IDN-01 FS-01 NET-16 PRV-29 FS-28 FS-09 KRN-28 FS-22",
           weakness=Weakness(oci=lambda d: d["process"]["user"].update(uid=0, gid=0), docker=lambda b: b.update(User="0:0"))),
    Mutant("no-userns", "no user namespace of its own", "PRV-04 KRN-03", may="PRV-03 KRN-04 FS-02 FS-15 PRV-06 PRV-10",
           engines=("oci",), weakness=Weakness(oci=weaken.no_userns)),
    Mutant("read-write-root", "the base system can be written", "FS-02 PRV-29", live=weaken.writable_root, engines=("docker",), may="FS-01"),
    Mutant("mount-suid", "setuid files in /dev/shm have effect", "FS-02 PRV-06",
           weakness=Weakness(oci=weaken.loose("nosuid", "/dev/shm")), engines=("oci",)),
    Mutant("extra-mount", "/etc of the host, read-only", "FS-02", may="PRV-06 FS-03 FS-12", weakness=weaken.bind("/etc", "/mnt")),
    Mutant("shared-propagation", "a mount that is tied to others", "FS-03 FS-02", live=weaken.shared, may="FS-12", groups=()),
    Mutant("device-node", "/dev/mem is there", "FS-05 FS-07 FS-02", may="FS-03 PRV-06 FS-12", live=weaken.device),
    Mutant("neighbours-files", "the folders of all apps", "FS-13 FS-02", live=weaken.others_files,
           may="FS-03 FS-12 FS-15 FS-14 PRV-06 FS-20 FS-01 FS-16 PRV-28 IDN-05"),
    Mutant("named-folder", "a mount that names a folder of the host", "FS-12 FS-02", live=weaken.named_mount, may="FS-03 PRV-06 FS-14"),
    Mutant("terminals", "more terminals", "RES-10 FS-02", live=weaken.terminals, limits=("handles",), groups=()),
    Mutant("watches", "more file watches", "FS-24", live=weaken.inotify, groups=(), engines=("oci",)),
    Mutant("no-masks", "nothing of /proc is masked or read-only", "FS-08 FS-02 FS-11 FS-09",
           may="FS-10 KRN-28 KRN-29 IDN-03 PRV-06",
           weakness=Weakness(oci=lambda d: weaken.linux(d).update(maskedPaths=[], readonlyPaths=[]),
                             docker=weaken.host_config(MaskedPaths=[], ReadonlyPaths=[]))),
    Mutant("one-mask-off", "one mask is taken off the live twin", "FS-08 FS-02 FS-11", live=weaken.unmask),
    # Not with Docker: its host network is the daemon's, outside of our stage.
    Mutant("host-network", "the host's network", "KRN-06 NET-18", engines=("oci",),
           may=f"{_WALLED} KRN-04 RES-17 RES-18 RES-19 KRN-03 NET-14 LOG-06",
           weakness=Weakness(oci=weaken.oci_namespace("network"))),
    Mutant("missing-mount", "a planned mount is missing", "FS-02 FS-15", may="FS-17 FS-18", groups=(),
           weakness=Weakness(oci=weaken.without_mount, docker=weaken.without_mount_docker)),
    Mutant("host-pids", "the host's processes", "KRN-06 PRV-19",
           may="PRV-04 KRN-03 PRV-03 KRN-04 FS-02 FS-15 PRV-06 PRV-23 PRV-20 PRV-10 PRV-21 IDN-03 FS-27 PRV-29",
           weakness=Weakness(oci=weaken.host_pids, docker=weaken.host_config(PidMode="host"))),
    Mutant("host-ipc", "the host's shared memory", "KRN-06", may="KRN-04 FS-02 FS-17 RES-13 KRN-03 PRV-06",
           weakness=Weakness(oci=weaken.oci_namespace("ipc"), docker=weaken.host_ipc_docker)),
    Mutant("control-socket", "a control socket in its files", "FS-14", live=weaken.control_socket),
    Mutant("cgroup-mounted", "its own limits are in its file system", "FS-28 FS-02 RES-20", may="PRV-06 FS-03 FS-12",
           live=weaken.cgroup_inside),
    Mutant("env-leak", "a secret of the supervisor in its variables", "IDN-03",
           weakness=Weakness(oci=lambda d: d["process"]["env"].append(weaken.secret()), docker=lambda b: b["Env"].append(weaken.secret()))),
    Mutant("oom-score", "the kernel kills others first", "PRV-26", engines=("oci", "docker"), weakness=weaken.policy(oom_score=0)),
    Mutant("core-dumps", "core dumps without a limit", "PRV-31", weakness=weaken.limit("CORE", 1 << 30)),
    Mutant("locked-memory", "may pin memory", "RES-14", weakness=weaken.limit("MEMLOCK", 8 * MIB), limits=("handles",)),
    Mutant("open-files", "more open files", "RES-08", may="RES-09", weakness=weaken.limit("NOFILE", 11_000), limits=("handles",)),
    Mutant("queues", "more message queues", "RES-13", weakness=weaken.limit("MSGQUEUE", 8 << 20), limits=("handles",)),
    Mutant("signals", "more pending signals", "RES-12", weakness=weaken.limit("SIGPENDING", 4096), limits=("handles",)),
    Mutant("more-memory", "a raised memory limit", "RES-01", may="RES-02", live=weaken.more_memory, groups=(), limits=("memory",)),
    Mutant("more-swap", "a raised limit on memory and swap", "RES-02", live=weaken.more_swap, groups=()),
    Mutant("more-pids", "a raised process limit", "RES-05 RES-06 PRV-24", groups=(), limits=("processes",),
           weakness=Weakness(policy=weaken.double_pids)),
    Mutant("raised-pids", "the process limit is raised in its cgroup", "RES-05", live=weaken.more_pids, groups=()),
    Mutant("more-cpu", "no CPU cap", "RES-07 RES-23", live=weaken.more_cpu, groups=(), limits=("cpu",)),
    Mutant("more-disk", "a larger disk", "FS-17", may="FS-18 FS-19", weakness=Weakness(policy=weaken.double_disk), groups=(), limits=("disk",)),
    Mutant("more-inodes", "more files", "FS-18", may="FS-17", weakness=Weakness(policy=lambda p: p._replace(disk_inodes=p.disk_inodes * 2)), groups=()),
    Mutant("more-shm", "more shared memory", "FS-17 FS-02", weakness=Weakness(policy=lambda p: p._replace(shm_bytes=p.shm_bytes * 2)), groups=(), limits=("shm",)),
    Mutant("file-size", "files of any size", "FS-19", weakness=weaken.limit("FSIZE", 1 << 41), groups=(), limits=("files",), may="FS-17 FS-18"),
    Mutant("all-devices", "every device may be opened", "FS-06", live=weaken.all_devices, groups=()),
    Mutant("left-the-cgroup", "a process outside of its limits", "PRV-23", may="RES-11", live=weaken.escape, groups=()),
    Mutant("entered", "a process of the host moved in", "PRV-10 PRV-01 PRV-02 PRV-03 PRV-28", live=weaken.entered, groups=(),
           may="RES-11 IDN-01 IDN-02 PRV-26 PRV-31 RES-08 RES-12 RES-13 RES-14 FS-19 PRV-25 IDN-05 PRV-04 PRV-23 IDN-03"),
    Mutant("poisoned-file", "another file in the place of the shell", "FS-21 FS-02", live=weaken.another_shell, groups=(), may="FS-03 FS-12"),
    Mutant("second-mount", "a mount by nsenter", "FS-02", live=weaken.from_host("/etc", "/mnt"), groups=(), may="FS-03 PRV-06 FS-12"),
    Mutant("second-interface", "another network card", "NET-01", may=_WALLED, live=weaken.second_way, groups=()),
    Mutant("ipv6-on", "IPv6 is switched on", "NET-01", may=_WALLED, live=weaken.ipv6_on, groups=()),
    Mutant("no-table", "the router's table is deleted", "NET-29 NET-02 NET-03 NET-04 NET-05 NET-06 NET-07 NET-08 NET-21",
           may=f"{_WALLED} RES-17 RES-18 LOG-06", live=weaken.nft("delete table inet sandbox"), groups=()),
    Mutant("no-deny", "the rule that denies inner ranges is gone", "NET-29 NET-03 NET-04 NET-05", may="NET-06 NET-26 NET-02 LOG-06",
           live=weaken.nft(drop=("@deny4",)), groups=(), network=True),
    Mutant("one-range", "one range is no longer denied", "NET-29 NET-04", may="NET-05",
           live=weaken.nft("delete element inet sandbox deny4 {{ 169.254.169.254 }}"), groups=()),
    Mutant("no-host-rule", "the rule that denies this host is gone", "NET-29 NET-02",
           live=weaken.nft(drop=("@hosts4",)), groups=(), network=True),
    Mutant("no-senders", "senders are not looked at", "NET-29 NET-08", live=weaken.nft(drop=("@src4",)), groups=(), network=True),
    Mutant("no-ipv4-rule", "the rule against IPv6 is gone", "NET-29 NET-07", live=weaken.nft(drop=("meta nfproto != ipv4",)), groups=(), network=True, may="NET-08"),
    Mutant("no-mail-rule", "the rule against mail is gone", "NET-29 NET-21", live=weaken.nft(drop=("tcp dport 25",)), groups=(), network=True),
    Mutant("no-rates", "no rate of new flows", "NET-29 NET-22", live=weaken.nft(drop=("@fresh",)), groups=(), network=True),
    Mutant("no-flow-caps", "flows are not counted", "NET-29 RES-17", live=weaken.nft(drop=("ct count over",)), groups=()),
    Mutant("no-flow-limit", "this dyno has no limit on flows", "RES-17 RES-18", may="NET-01", live=weaken.nft('delete element inet sandbox flows_{flows} {{ "{link}" }}'), groups=()),
    Mutant("extra-permit", "this dyno may reach one inner address more", "NET-04 NET-05 NET-30", groups=(),
           live=weaken.nft('add element inet sandbox permit4 {{ "{link}" . 169.254.169.254 . tcp . 80 }}')),
    Mutant("extra-mail", "this dyno may send mail", "NET-21", groups=(),
           live=weaken.nft('add element inet sandbox smtp {{ "{link}" }}')),
    Mutant("extra-sender", "this dyno may use another address", "NET-08", groups=(),
           live=weaken.nft('add element inet sandbox src4 {{ "{link}" . 192.0.2.9 }}')),
    Mutant("extra-port", "this host may ask another port", "NET-17", groups=(),
           live=weaken.nft('add element inet sandbox inbound4 {{ "{link}" . 192.0.2.9 . 9999 }}')),
    Mutant("open-inbound", "everybody may connect to it", "NET-29 NET-17",
           live=weaken.nft("insert rule inet sandbox inward accept", 'add element inet sandbox reply4 {{ "{link}" . 9999 }}'), groups=(), network=True),
    Mutant("helper", "a helper that opens ports", "NET-29 NET-24",
           live=weaken.nft('add ct helper inet sandbox ftp {{ type "ftp" protocol tcp; }}\nadd rule inet sandbox rates tcp dport 21 ct helper set "ftp"'), groups=()),
    Mutant("no-label", "no AppArmor profile", "KRN-30", needs="/sys/kernel/security/apparmor",
           weakness=Weakness(oci=lambda d: d["process"].pop("apparmorProfile"),
                             docker=lambda b: b["HostConfig"].update(
                                 SecurityOpt=[o for o in b["HostConfig"]["SecurityOpt"] if not o.startswith("apparmor=")] + ["apparmor=unconfined"])), groups=()),
    Mutant("fails-open", "the router routes what no rule has passed", "NET-28", live=weaken.no_routing_rules, groups=(), vanish=True, may="NET-29 NET-23"),
)  # fmt: skip


_VULNERABILITY = "/sys/devices/system/cpu/vulnerabilities/meltdown"

HOST: tuple[Mutant, ...] = (
    Mutant("core-helper", "the host starts a helper for core dumps", "PRV-31",
           host=(("/proc/sys/kernel/core_pattern", "|/bin/false"),)),
    Mutant("merged-pages", "the host merges equal pages", "SCH-02", host=(("/sys/kernel/mm/ksm/run", "1"),)),
    Mutant("log-unlimited", "the kernel log has no rate", "RES-21", host=(("/proc/sys/kernel/printk_ratelimit", "0"),)),
    Mutant("open-processor", "the processor has an open hole", "KRN-32", host=((_VULNERABILITY, "Vulnerable"),)),
    Mutant("siblings", "the processor shares its cores", "SCH-01", host=(("/sys/devices/system/cpu/smt/active", "1"),)),
)  # fmt: skip


def catches(mutant: Mutant, red: frozenset[str]) -> tuple[list[str], list[str]]:
    """(rows that should have turned red and did not, rows that turned red and should not)."""
    missed = sorted(mutant.must - red)
    return missed, [] if mutant.may == "*" else sorted(red - mutant.allowed)
