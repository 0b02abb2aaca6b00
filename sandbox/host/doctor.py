"""What this host can enforce, what it cannot, how we know, and the command that mends it."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from enum import Enum
from typing import NamedTuple

import psutil

from sandbox import hostcmd
from sandbox.config import Config
from sandbox.errors import HostError, SandboxError
from sandbox.host import apparmor, cgroup, facts, netns, stack, syscalls
from sandbox.host.cgroup import Cgroup
from sandbox.host.netlink import Netlink
from sandbox.host.nft import Nft
from sandbox.units import GIB, format_bytes


class Verdict(Enum):
    OK = "ok"
    ADVICE = "advice"  # works, could be harder
    MISSING = "missing"  # a promise cannot be kept here


class Finding(NamedTuple):
    """``evidence``: what was read or tried. ``mend``: a command to paste, or empty."""

    topic: str
    verdict: Verdict
    statement: str
    evidence: str
    mend: str = ""


# Host switches: path below /proc/sys, wanted values, why. HARDENING: each is a second layer, never the only one.
_SWITCHES = (
    ("kernel/io_uring_disabled", {"2"}, "io_uring hides work from system-call filters; ours refuses it as well"),
    ("kernel/kptr_restrict", {"1", "2"}, "kernel addresses help exploits"),
    ("kernel/dmesg_restrict", {"1"}, "the kernel log names addresses and neighbours"),
    (
        "kernel/unprivileged_bpf_disabled",
        {"1", "2"},
        "bpf(2) is a frequent way into the kernel; ours refuses it as well",
    ),
    ("net/core/bpf_jit_harden", {"2"}, "blinds constants against JIT spraying"),
    ("vm/unprivileged_userfaultfd", {"0"}, "widens races in exploits; ours refuses it as well"),
    ("dev/tty/legacy_tiocsti", {"0"}, "types into a terminal's reader; ours refuses it as well"),
    ("dev/tty/ldisc_autoload", {"0"}, "autoloads line disciplines; ours refuses it as well"),
    ("fs/protected_symlinks", {"1"}, "links planted in shared folders"),
    ("fs/protected_hardlinks", {"1"}, "hard links to files of others"),
    ("fs/protected_fifos", {"2"}, "FIFOs planted in shared folders"),
    ("fs/protected_regular", {"2"}, "files planted in shared folders"),
    ("fs/suid_dumpable", {"0"}, "core dumps of privileged programs"),
    ("kernel/randomize_va_space", {"2"}, "address randomisation"),
    ("kernel/sysrq", {"0"}, "kernel control from a keyboard or /proc"),
)
# As of 2026-11, from the projects' security advisories. Fixed upstream in these versions; a distribution may have
# backported a fix without changing the number.
_RUNC_FIXES = (
    ((1, 1, 12), "CVE-2024-21626 (leaked descriptor)"),
    ((1, 2, 8), "CVE-2025-31133, CVE-2025-52565, CVE-2025-52881 (masks and redirected /proc writes)"),
)


def examine(config: Config) -> Iterator[Finding]:
    """Every finding, as it is made. An examination that breaks is itself a finding, never a pass."""
    for check in _CHECKS:
        try:
            yield from check(config)
        except (OSError, SandboxError, ValueError, IndexError) as error:
            name = check.__name__.strip("_")
            yield Finding(name, Verdict.MISSING, "could not be examined", f"{type(error).__name__}: {error}")


def _privilege(_: Config) -> Iterator[Finding]:
    root = os.geteuid() == 0
    yield Finding(
        "root",
        _verdict(ok=root),
        "runs as root" if root else "does not run as root",
        f"uid {os.geteuid()}",
        "" if root else "sudo sandbox doctor",
    )


def _programs(_: Config) -> Iterator[Finding]:
    needed = {
        "conmon": "conmon",
        "mmdebstrap": "mmdebstrap",
        "mksquashfs": "squashfs-tools",
        "mkfs.ext4": "e2fsprogs",
        "nft": "nftables",
        "dnsmasq": "dnsmasq-base",
        "nsenter": "util-linux",
        "setpriv": "util-linux",
        "prlimit": "util-linux",
    }
    for program, package in needed.items():
        path = hostcmd.which(program)
        yield Finding(
            "programs",
            _verdict(ok=path is not None),
            f"{program}",
            path or "not found",
            f"apt-get install {package}" if path is None else "",
        )


# What the network wall is made of, in one small table: keys of several fields, a limit per element, a routing lookup.
_TRIAL = """
table inet trial {
  set places { type ifname . ipv4_addr . inet_proto . inet_service; flags interval; counter; }
  set rates { type ifname; limit rate over 1/second; elements = { "eth0" limit rate over 5/second } }
  set counted { type ifname; flags dynamic; }
  map reasons { type ipv4_addr : mark; flags interval; elements = { 10.0.0.0/8 : 4 } }
  chain input {
    type filter hook prerouting priority raw; policy accept;
    meta mark set ip daddr map @reasons drop
    fib daddr type local counter
    iifname @rates add @counted { iifname ct count over 10 } log group 5 drop
  }
}
"""


def _labels(_: Config) -> Iterator[Finding]:
    if not apparmor.enabled():
        yield Finding(
            "labels", Verdict.ADVICE, "AppArmor is off: no second wall", "/sys/module/apparmor/parameters/enabled"
        )
        return
    parser = hostcmd.which("apparmor_parser")
    yield Finding(
        "labels",
        _verdict(ok=parser is not None),
        "AppArmor is on; every dyno gets a profile of ours",
        parser or "apparmor_parser not found",
        "" if parser else "apt-get install apparmor",
    )


def _network(config: Config) -> Iterator[Finding]:
    """Tries the wall's parts in a network namespace of its own: the host's rules are not touched."""
    base = config.run_dir if os.path.isdir(config.run_dir) else "/run"
    scratch = tempfile.mkdtemp(prefix="doctor-", dir=base)
    try:
        netns.make(f"{scratch}/netns")
        fd = os.open(f"{scratch}/netns", os.O_RDONLY | os.O_CLOEXEC)
        try:
            with netns.entered(fd):
                nft, net = Nft(), Netlink()
            nft.run(_TRIAL)
            yield Finding("network", Verdict.OK, "nftables", "a table like the wall's was loaded in a namespace")
            mac = bytes.fromhex("020000000001")
            net.veth("try0", mac, group=91, peer="try1", peer_mac=mac, peer_netns=fd, flags=0)
            yield Finding("network", Verdict.OK, "veth links and interface groups", "a pair was made in a namespace")
            nft.close()
            net.close()
        finally:
            os.close(fd)
            syscalls.umount(f"{scratch}/netns", detach=True)
    except (HostError, OSError) as error:
        said = error.message if isinstance(error, HostError) else str(error)
        yield Finding("network", Verdict.MISSING, "the network wall", said, "apt-get install nftables")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    legacy = _read_if_there("/proc/net/ip_tables_names").split()
    if legacy:
        yield Finding(
            "network",
            Verdict.ADVICE,
            "iptables-legacy has tables, which nftables does not see",
            f"/proc/net/ip_tables_names: {', '.join(legacy)}; a FORWARD policy of DROP there cuts every dyno's egress",
            "update-alternatives --set iptables /usr/sbin/iptables-nft",
        )


def _read_if_there(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _runtimes(_: Config) -> Iterator[Finding]:
    found = {name: hostcmd.which(name) for name in ("runc", "crun", "runsc")}
    if not any(found.values()):
        yield Finding(
            "engine oci", Verdict.MISSING, "no OCI runtime", "runc, crun and runsc not found", "apt-get install runc"
        )
    for name, path in found.items():
        if path is None:
            continue
        text = hostcmd.run([path, "--version"]).stdout.decode("utf-8", "replace").splitlines()[0]
        if name == "crun" and not cgroup.unified():
            yield Finding("engine oci", Verdict.ADVICE, "crun refuses this host's cgroup layout", text, "use runc here")
            continue
        lacking = _unfixed(text) if name == "runc" else []
        if lacking:
            evidence = f"{text}; by its number it lacks {', '.join(lacking)} (your distribution may have backported)"
            yield Finding(
                "engine oci",
                Verdict.ADVICE,
                f"{name} has known escapes",
                evidence,
                "apt-get install --only-upgrade runc",
            )
        else:
            yield Finding("engine oci", Verdict.OK, name, text)


def _unfixed(version_line: str) -> list[str]:
    match = re.search(r"(\d+)\.(\d+)\.(\d+)", version_line)
    if match is None:
        return ["(version unreadable)"]
    version = tuple(int(part) for part in match.groups())
    return [cve for fixed, cve in _RUNC_FIXES if version < fixed]


def _docker(config: Config) -> Iterator[Finding]:
    path = config.docker_host.removeprefix("unix://")
    if not os.path.exists(path):
        yield Finding(
            "engine docker",
            Verdict.ADVICE,
            "no Docker daemon",
            f"{path} does not exist",
            "apt-get install docker.io (optional)",
        )
        return
    mode = os.stat(path).st_mode & 0o777
    world = bool(mode & 0o006)
    yield Finding(
        "engine docker",
        _verdict(ok=not world),
        "anybody may drive the Docker daemon" if world else "Docker socket",
        f"{path} has mode {mode:04o}",
        f"chmod 0660 {path}" if world else "",
    )


def _cgroups(_: Config) -> Iterator[Finding]:
    layout = "v2, unified" if cgroup.unified() else "v1"
    group = Cgroup.of(os.getpid())
    present = {"memory", "pids", "cpu", "devices"} & set(group.paths)
    if cgroup.unified():
        with open(f"{cgroup.ROOT}/cgroup.controllers", encoding="ascii") as file:
            present = set(file.read().split()) | {"devices"}
    for name in ("memory", "pids", "cpu", "devices"):
        ok = name in present
        yield Finding(
            "cgroups",
            _verdict(ok=ok),
            f"{name} limits",
            f"cgroup {layout}: controller {'present' if ok else 'absent'}",
            "" if ok else "boot with the controller enabled",
        )
    if not cgroup.unified() and not os.path.exists(f"{cgroup.ROOT}/memory/memory.memsw.limit_in_bytes"):
        yield Finding(
            "cgroups",
            Verdict.MISSING,
            "swap limits",
            "memory.memsw.limit_in_bytes is absent",
            "boot with swapaccount=1",
        )


def _memory(_: Config) -> Iterator[Finding]:
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    yield Finding(
        "memory", Verdict.OK, "memory", f"{format_bytes(memory.total)}, {format_bytes(memory.available)} available"
    )
    if swap.total:
        yield Finding("memory", Verdict.OK, "swap: over quota a dyno swaps, as at Heroku", format_bytes(swap.total))
    else:
        yield Finding(
            "memory", Verdict.OK, "no swap: between quota and kill limit memory is counted, not swapped", "SwapTotal 0"
        )


def _disk(config: Config) -> Iterator[Finding]:
    usage = psutil.disk_usage(config.state_dir if os.path.isdir(config.state_dir) else "/")
    yield Finding(
        "disk",
        _verdict(ok=usage.free > 4 * GIB),
        "room for disks and slugs",
        f"{format_bytes(usage.free)} free",
        "" if usage.free > 4 * GIB else "free space, or another --state-dir",
    )


def _user_namespaces(_: Config) -> Iterator[Finding]:
    fd = syscalls.user_namespace(0x70000000, owner=0x70000000 + 1000)
    os.close(fd)
    yield Finding("kernel", Verdict.OK, "user namespaces", "one was made for an unprivileged id")


def _file_systems(config: Config) -> Iterator[Finding]:
    """Tries the mounts of a dyno in a scratch folder: squashfs through a loop device, mapped owners, an overlay."""
    mksquashfs = hostcmd.require("mksquashfs", "squashfs-tools")
    base = config.run_dir if os.path.isdir(config.run_dir) else "/run"
    scratch = tempfile.mkdtemp(prefix="doctor-", dir=base)
    done: list[str] = []
    try:
        for name in ("tree", "image", "mapped", "upper", "work", "merged"):
            os.mkdir(f"{scratch}/{name}")
        hostcmd.run([mksquashfs, f"{scratch}/tree", f"{scratch}/t.squashfs", "-quiet", "-no-progress"])
        fd, device = syscalls.attach_loop(f"{scratch}/t.squashfs", read_only=True)
        try:
            syscalls.mount(device, f"{scratch}/image", "squashfs", syscalls.MS_RDONLY)
        finally:
            os.close(fd)
        done.append(f"{scratch}/image")
        yield Finding("kernel", Verdict.OK, "squashfs on a loop device", f"mounted {device}")
        userns = syscalls.user_namespace(0x70000000, owner=0x70000000 + 1000)
        try:
            syscalls.clone_mount(
                f"{scratch}/image", f"{scratch}/mapped", attributes=syscalls.ATTR_RDONLY, userns_fd=userns
            )
            done.append(f"{scratch}/mapped")
            yield Finding("kernel", Verdict.OK, "mapped owners on squashfs", "mount_setattr MOUNT_ATTR_IDMAP")
        except OSError as error:
            yield Finding(
                "kernel",
                Verdict.ADVICE,
                "no mapped owners on squashfs: images are copied to ext4 when they are first used",
                f"{error.strerror}; Linux 6.2 and newer have them",
                "install a newer kernel (Debian 12: from backports)",
            )
        finally:
            os.close(userns)
    finally:
        for target in reversed(done):
            syscalls.umount(target, detach=True)
        shutil.rmtree(scratch, ignore_errors=True)


def _switches(_: Config) -> Iterator[Finding]:
    for path, wanted, why in _SWITCHES:
        key = path.replace("/", ".")
        try:
            with open(f"/proc/sys/{path}", encoding="ascii") as file:
                value = file.read().strip()
        except FileNotFoundError:
            yield Finding("switches", Verdict.ADVICE, key, f"this kernel has no such switch; {why}")
            continue
        if value in wanted:
            yield Finding("switches", Verdict.OK, key, f"= {value}")
        else:
            yield Finding("switches", Verdict.ADVICE, key, f"= {value}; {why}", f"sysctl -w {key}={max(wanted)}")


def _processors(_: Config) -> Iterator[Finding]:
    folder = "/sys/devices/system/cpu/vulnerabilities"
    open_holes = []
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        with open(f"{folder}/{name}", encoding="ascii") as file:
            if file.read().startswith("Vulnerable"):
                open_holes.append(name)
    if open_holes:
        yield Finding(
            "processor",
            Verdict.ADVICE,
            "side channels are open",
            ", ".join(open_holes),
            "update microcode and kernel, or switch SMT off",
        )
    else:
        yield Finding("processor", Verdict.OK, "the kernel lists no processor hole as open", folder)


def _stacks(config: Config) -> Iterator[Finding]:
    for variant in stack.Variant:
        try:
            found = stack.find(config, variant)
        except HostError:
            raise
        except SandboxError as error:
            yield Finding("stack", Verdict.MISSING, f"{variant.value} image", error.message, error.hint or "")
            continue
        current = stack.is_current(config, variant)
        yield Finding(
            "stack",
            Verdict.OK if current else Verdict.ADVICE,
            f"{variant.value} image" if current else f"{variant.value} image of an older recipe",
            f"SHA256:{found.digest}",
            "" if current else "sandbox stack build",
        )


def _verdict(*, ok: bool) -> Verdict:
    return Verdict.OK if ok else Verdict.MISSING


Check = Callable[[Config], Iterator[Finding]]
_CHECKS: tuple[Check, ...] = (
    _privilege,
    _programs,
    _labels,
    _network,
    _runtimes,
    _docker,
    _cgroups,
    _memory,
    _disk,
    _user_namespaces,
    _file_systems,
    _stacks,
    _switches,
    _processors,
)


def summary(found: list[Finding]) -> dict[str, int]:
    """How many of each verdict."""
    return {verdict.value: sum(finding.verdict is verdict for finding in found) for verdict in Verdict}


def host_facts() -> dict[str, object]:
    """What the findings are about."""
    host, uname = facts.read(), os.uname()
    return {
        "kernel": uname.release,
        "machine": uname.machine,
        "cpus": os.cpu_count(),
        "memory_bytes": host.memory_bytes,
        "swap": host.swap,
    }


def document(found: list[Finding]) -> dict[str, object]:
    """The findings and what they are about, as JSON."""
    rows = [{**finding._asdict(), "verdict": finding.verdict.value} for finding in found]
    return {"host": host_facts(), "summary": summary(found), "findings": rows}
