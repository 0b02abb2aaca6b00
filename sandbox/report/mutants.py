"""Mutants: twins with one clause of the wall taken out. A check that none of them turns red may be blind.

Each names the rows that must turn red, and those that may (where one clause is seen by several rows). Any other red
row is a sloppy check, and is reported as such.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
from collections.abc import Callable
from typing import Any, NamedTuple

from sandbox.firewall import admit, guard, router
from sandbox.firewall.layout import Layout
from sandbox.host import netns
from sandbox.host import syscalls as sys
from sandbox.host.netlink import Netlink
from sandbox.host.nft import Nft
from sandbox.policy.policy import Policy
from sandbox.report.session import QUICK
from sandbox.report.twin import NONE, Edit, Twin, Wanted, Weakness
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

    @property
    def rules(self) -> bool:
        """Whether the twins' router is another one afterwards."""
        return "NET-" in self.turns or "RES-17" in self.turns

    def impossible(self, wanted: Wanted) -> str:
        """Why this host cannot make the mutant; an empty text when it can."""
        for missing in (path for path, _ in self.host if not os.path.exists(path)):
            return f"this kernel has no {missing}"
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


# ---- documents


def _linux(document: Json) -> Json:
    found: Json = document["linux"]
    return found


def _no_seccomp_docker(body: Json) -> None:
    body["HostConfig"]["SecurityOpt"] = ["no-new-privileges", "seccomp=unconfined"]


def _seccomp(change: Edit) -> Weakness:
    """The filter with a change, in both engines' documents."""
    import json

    def docker(body: Json) -> None:
        options = body["HostConfig"]["SecurityOpt"]
        for index, option in enumerate(options):
            if option.startswith("seccomp="):
                profile = json.loads(option.removeprefix("seccomp="))
                change(profile)
                options[index] = "seccomp=" + json.dumps(profile)

    return Weakness(oci=lambda document: change(_linux(document)["seccomp"]), docker=docker)


def _allow(*calls: str) -> Weakness:
    return _seccomp(lambda profile: profile["syscalls"].append({"names": list(calls), "action": "SCMP_ACT_ALLOW"}))


def _no_flag_checks(profile: Json) -> None:
    """``clone`` passes whatever its flags are."""
    profile["syscalls"] = [entry for entry in profile["syscalls"] if entry["names"] != ["clone"]]
    profile["syscalls"].append({"names": ["clone", "unshare"], "action": "SCMP_ACT_ALLOW"})


def _high_bits(profile: Json) -> None:
    """As a careless list of refused values would: what has high bits is none of them."""
    for name, index in (("socket", 0), ("ioctl", 1)):
        profile["syscalls"].append(
            {
                "names": [name],
                "action": "SCMP_ACT_ALLOW",
                "args": [{"index": index, "value": 1 << 32, "valueTwo": 1 << 32, "op": "SCMP_CMP_MASKED_EQ"}],
            }
        )


def _foreign(profile: Json) -> None:
    # 32-bit programs have one call for all that sockets do: libseccomp takes no conditions on a part of it.
    plain = {"socket", "socketpair", "setsockopt", "shmget"}
    profile["syscalls"] = [entry for entry in profile["syscalls"] if not set(entry["names"]) <= plain]
    profile["syscalls"].append({"names": sorted(plain), "action": "SCMP_ACT_ALLOW"})
    profile["architectures"] = ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]


def _families(profile: Json) -> None:
    profile["syscalls"] = [entry for entry in profile["syscalls"] if entry["names"] != ["socket"]]
    profile["syscalls"].append({"names": ["socket"], "action": "SCMP_ACT_ALLOW"})


def _options(profile: Json) -> None:
    kept = [entry for entry in profile["syscalls"] if entry["names"] not in (["setsockopt"], ["ioctl"], ["personality"])]
    profile["syscalls"] = [*kept, {"names": ["setsockopt", "ioctl", "personality"], "action": "SCMP_ACT_ALLOW"}]


def _modes(profile: Json) -> None:
    names = ("chmod", "fchmod", "fchmodat", "creat", "open", "openat", "mknod", "mknodat", "mmap")
    kept = [entry for entry in profile["syscalls"] if not set(entry["names"]) <= set(names)]
    profile["syscalls"] = [*kept, {"names": list(names), "action": "SCMP_ACT_ALLOW"}]


_SETS = ("bounding", "effective", "permitted", "inheritable", "ambient")


def _capabilities(*names: str) -> Weakness:
    def oci(document: Json) -> None:
        document["process"]["capabilities"] = dict.fromkeys(_SETS, [f"CAP_{name}" for name in names])

    def docker(body: Json) -> None:
        body["HostConfig"]["CapAdd"] = list(names)
        # Only root gets them into its effective set; an app's id keeps them in the bounding set alone.

    return Weakness(oci=oci, docker=docker)


def _oci_namespace(kind: str) -> Edit:
    def edit(document: Json) -> None:
        linux = _linux(document)
        linux["namespaces"] = [entry for entry in linux["namespaces"] if entry["type"] != kind]
        if kind == "uts":
            document.pop("hostname")

    return edit


def _no_userns(document: Json) -> None:
    """As before user namespaces: ids inside are ids of the host."""
    linux = _linux(document)
    base = int(linux["uidMappings"][0]["hostID"])
    _oci_namespace("user")(document)
    linux.pop("uidMappings")
    linux.pop("gidMappings")
    document["process"]["user"].update(uid=base + 1000, gid=base + 1000)
    # Without one, these would be mounted with other owners; they are not what is looked at.
    document["mounts"] = [m for m in document["mounts"] if m["destination"] != "/dev/mqueue"]


def _without_mount(document: Json) -> None:
    document["mounts"] = [mount for mount in document["mounts"] if mount["destination"] != "/var/tmp"]


def _without_mount_docker(body: Json) -> None:
    mounts = body["HostConfig"]["Mounts"]
    body["HostConfig"]["Mounts"] = [mount for mount in mounts if mount["Target"] != "/var/tmp"]


def _host_ipc_docker(body: Json) -> None:
    body["HostConfig"]["IpcMode"] = "host"
    body["HostConfig"].pop("Tmpfs")


def _bind(source: str, target: str, *options: str) -> Weakness:
    def oci(document: Json) -> None:
        document["mounts"].append(
            {"destination": target, "type": "bind", "source": source, "options": ["bind", *(options or ("ro",))]}
        )

    def docker(body: Json) -> None:
        body["HostConfig"]["Mounts"].append(
            {"Type": "bind", "Source": source, "Target": target, "ReadOnly": "rw" not in options}
        )

    return Weakness(oci=oci, docker=docker)


def _process(**values: Any) -> Edit:
    return lambda document: document["process"].update(values)


def _host_config(**values: Any) -> Edit:
    return lambda body: body["HostConfig"].update(values)


def _loose(flag: str, target: str) -> Edit:
    def edit(document: Json) -> None:
        for mount in document["mounts"]:
            if mount["destination"] == target:
                mount["options"] = [option for option in mount["options"] if option != flag]

    return edit


def _node(document: Json) -> None:
    _linux(document).setdefault("devices", []).append(
        {"path": "/dev/mem", "type": "c", "major": 1, "minor": 1, "fileMode": 0o666, "uid": 0, "gid": 0}
    )


def _bare_oci(document: Json) -> None:
    """No wall but the namespaces and the cgroup: what an attack looks like when it works."""
    linux = _linux(document)
    _oci_namespace("user")(document)
    for key in ("uidMappings", "gidMappings", "seccomp"):
        linux.pop(key, None)
    linux.update(maskedPaths=[], readonlyPaths=[])
    document["root"]["readonly"] = False
    document["process"].update(noNewPrivileges=False, oomScoreAdj=0)
    document["process"]["user"].update(uid=0, gid=0)
    document["process"]["capabilities"] = dict.fromkeys(_SETS, _own_capabilities())
    linux["resources"]["devices"] = [{"allow": True, "access": "rwm"}]
    document["mounts"] = [mount for mount in document["mounts"] if mount["destination"] not in ("/sys", "/sys/fs/cgroup", "/dev/mqueue")]  # fmt: skip
    document["mounts"].append({"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["rw"]})


def _bare_docker(body: Json) -> None:
    body["User"] = "0:0"
    body["HostConfig"].update(
        CapDrop=[], OomScoreAdj=0,
        # Docker 20.10 does not know the three newest.
        CapAdd=[n.removeprefix("CAP_") for n in _own_capabilities() if not n.endswith(("_PERFMON", "_BPF", "_RESTORE"))],
        SecurityOpt=["seccomp=unconfined"], ReadonlyRootfs=False, MaskedPaths=[], ReadonlyPaths=[],
    )  # fmt: skip
    body["HostConfig"]["Mounts"] = [m for m in body["HostConfig"]["Mounts"] if not m["Target"].startswith("/sys")]


# linux/capability.h, in order.
_CAPABILITIES = """CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE
NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT
SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP
MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE""".split()


def _own_capabilities() -> list[str]:
    """What this host's root has: nobody can give more."""
    with open("/proc/self/status", encoding="ascii") as file:
        bounding = next(int(line.split()[1], 16) for line in file if line.startswith("CapBnd"))
    return [f"CAP_{name}" for number, name in enumerate(_CAPABILITIES) if bounding >> number & 1]


# ---- live changes, by the host's root, from outside


def _write(twin: Twin, controller: str, name: str, value: str) -> None:
    base = twin.cgroup.paths.get("" if twin.cgroup.is_v2 else controller, "")
    with open(f"{base}/{name}", "w", encoding="ascii") as file:
        file.write(value)


def _more_memory(twin: Twin) -> None:
    most = str(twin.wanted.policy.memory_max_bytes + 128 * MIB)
    if twin.cgroup.is_v2:
        _write(twin, "", "memory.max", most)
    else:
        _write(twin, "memory", "memory.memsw.limit_in_bytes", most)
        _write(twin, "memory", "memory.limit_in_bytes", most)


def _more_swap(twin: Twin) -> None:
    most = str(twin.wanted.policy.memory_swap_max_bytes + 128 * MIB)
    if twin.cgroup.is_v2:
        _write(twin, "", "memory.swap.max", most)
    else:
        _write(twin, "memory", "memory.memsw.limit_in_bytes", most)


def _more_pids(twin: Twin) -> None:
    _write(twin, "pids", "pids.max", str(twin.wanted.policy.pids_max + 128))


def _more_cpu(twin: Twin) -> None:
    if twin.cgroup.is_v2:
        _write(twin, "", "cpu.max", "max 100000")
    else:
        _write(twin, "cpu", "cpu.cfs_quota_us", "-1")


def _all_devices(twin: Twin) -> None:
    _write(twin, "devices", "devices.allow", "a")


def _escape(twin: Twin) -> None:
    """A process of the twin leaves its cgroup, by the host's hand."""
    child = next(pid for pid in twin.cgroup.pids() if pid != twin.pid)
    for path in set(twin.cgroup.paths.values()):
        above = os.path.dirname(path)
        try:
            with open(f"{above}/cgroup.procs", "w", encoding="ascii") as file:
                file.write(str(child))
        except OSError:
            continue


def _entered(twin: Twin) -> None:
    """A process of the host joins the twin's namespaces and cgroup, with root's rights and without a filter."""
    groups = list(set(twin.cgroup.paths.values()))
    kinds = ("ipc", "uts", "net", "pid", "cgroup", "mnt")
    fds = [os.open(f"/proc/{twin.pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC) for kind in kinds]
    ready_r, ready_w = os.pipe()
    middle = os.fork()
    if middle == 0:  # pragma: no cover - the child never returns
        try:
            for path in groups:
                with open(f"{path}/cgroup.procs", "w", encoding="ascii") as file:
                    file.write(str(os.getpid()))
            os.open("/etc", os.O_RDONLY)
            for fd in fds:
                sys.setns(fd, 0)
            if os.fork() == 0:
                os.write(ready_w, b"+")
                while True:
                    signal.pause()
        finally:
            os._exit(0)
    os.waitpid(middle, 0)
    os.read(ready_r, 1)
    for fd in (*fds, ready_r, ready_w):
        os.close(fd)


def _in_its_mounts(twin: Twin, action: Callable[[], None]) -> None:
    """Does something in the twin's mount namespace, as nsenter would."""
    fd = os.open(f"/proc/{twin.pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:  # pragma: no cover - the child never returns
        status = 1
        try:
            sys.setns(fd, sys.CLONE_NEWNS)
            action()
            status = 0
        finally:
            os._exit(status)
    os.close(fd)
    if os.waitpid(pid, 0)[1] != 0:
        raise OSError("the change of its mounts was refused")


def _from_host(source: str, target: str) -> Callable[[Twin], None]:
    """A folder of the host appears in the live twin."""

    def live(twin: Twin) -> None:
        tree = sys.take_tree(source)
        try:
            _in_its_mounts(twin, lambda: sys.put_tree(tree, target))
        finally:
            os.close(tree)

    return live


def _cgroup_inside(twin: Twin) -> None:
    _from_host("/sys/fs/cgroup" if twin.cgroup.is_v2 else "/sys/fs/cgroup/pids", "/mnt")(twin)


def _another_shell(twin: Twin) -> None:
    _in_its_mounts(twin, lambda: sys.mount("/usr/bin/env", "/usr/bin/bash", "", sys.MS_BIND))


def _shared(twin: Twin) -> None:
    _in_its_mounts(twin, lambda: sys.mount("", "/tmp", "", sys.MS_SHARED))


def _unmask(twin: Twin) -> None:
    """One mask comes off: the dyno sees the host's file below it."""
    _in_its_mounts(twin, lambda: sys.umount("/proc/cmdline", detach=True))


def _device(twin: Twin) -> None:
    """A device of the host in the twin's /dev: bound, since on a file system of its own ids root may make none."""
    owner = os.stat(f"/proc/{twin.pid}/root/dev").st_uid

    def file() -> None:
        os.setresgid(owner, owner, owner)
        os.setresuid(owner, owner, owner)
        os.close(os.open("/dev/mem", os.O_WRONLY | os.O_CREAT, 0o600))

    _in_its_mounts(twin, file)
    _from_host("/dev/loop-control", "/dev/mem")(twin)


def _writable_root(twin: Twin) -> None:
    flags = sys.MS_REMOUNT | sys.MS_BIND | sys.MS_NOSUID | sys.MS_NODEV
    _in_its_mounts(twin, lambda: sys.mount("", "/", "", flags))


def _others_files(twin: Twin) -> None:
    """The host's own folder, with every app's files below it, at the path that it has on the host."""
    top = "/" + twin.config.state_dir.split("/")[1]
    _from_host(top, top)(twin)


def _named_mount(twin: Twin) -> None:
    _from_host(twin.config.state_dir, "/mnt")(twin)


def _terminals(twin: Twin) -> None:
    flags = sys.MS_REMOUNT | sys.MS_NOSUID | sys.MS_NOEXEC
    options = "ptmxmode=0666,mode=0620,gid=5,max=96"
    _in_its_mounts(twin, lambda: sys.mount("devpts", "/dev/pts", "devpts", flags, options))


def _inotify(twin: Twin) -> None:
    """The limit inside its user namespace is raised by root of that namespace."""
    fd = os.open(f"/proc/{twin.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:  # pragma: no cover - the child never returns
        status = 1
        try:
            sys.setns(fd, sys.CLONE_NEWUSER)
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
            with open("/proc/sys/user/max_inotify_instances", "w", encoding="ascii") as file:
                file.write("100000")
            status = 0
        finally:
            os._exit(status)
    os.close(fd)
    if os.waitpid(pid, 0)[1] != 0:
        raise OSError("the limit could not be raised")


def _control_socket(twin: Twin) -> None:
    """A socket of the host's root lies where the twin can see it."""
    folder = os.open(f"{twin.record.spec.paths.disk}/tmp", os.O_PATH | os.O_CLOEXEC)
    with socket.socket(socket.AF_UNIX) as link:
        # The path of a Unix socket has at most 107 bytes; a folder's descriptor has few.
        link.bind(f"/proc/self/fd/{folder}/control.sock")
    os.close(folder)


def _nft(*texts: str, drop: tuple[str, ...] = ()) -> Callable[[Twin], None]:
    """Changes in the twins' router, with nobody there who would repair them. ``drop``: rules that contain a text."""

    def live(twin: Twin) -> None:
        layout = Layout(twin.config)
        guard.stop(layout)
        with router.inside(layout):
            nft = Nft()
        for text in texts:
            nft.run(text.format(link=_link(twin), flows=twin.wanted.policy.traffic.flows))
        for part in drop:
            _drop(nft, part)
        nft.close()

    return live


def _drop(nft: Nft, part: str) -> None:
    found = False
    for chain in ("from_dyno", "outward", "rates", "inward", "input", "ask"):
        text = nft.run(f"list chain inet sandbox {chain}\n", flags=1 << 3)  # with handles
        for line in text.splitlines():
            if part in line and "# handle " in line and "chain" not in line:
                nft.run(f"delete rule inet sandbox {chain} handle {line.rsplit(' ', 1)[1]}")
                found = True
    if not found:
        raise OSError(f"no rule contains {part!r}")


def _link(twin: Twin) -> str:
    from sandbox.firewall.layout import link_name

    return link_name(twin.record.spec.container_id)


def _second_way(twin: Twin) -> None:
    """A second interface in the twin's namespace, with its own way out."""
    with admit.os_open(twin.netns) as fd:
        net = Netlink()
        net.veth("stray0", b"\2\0\0\0\0\x0a", group=0, peer="eth1", peer_mac=b"\2\0\0\0\0\x0b", peer_netns=fd, flags=0)
        net.close()


def _ipv6_on(twin: Twin) -> None:
    with admit.os_open(twin.netns) as fd, netns.entered(fd):
        netns.write_sysctl("ipv6/conf/eth0/disable_ipv6", "0")
        netns.write_sysctl("ipv6/conf/all/disable_ipv6", "0")


def _no_routing_rules(twin: Twin) -> None:
    """What fails closed is undone: the router routes unmarked packets, too."""
    layout = Layout(twin.config)
    guard.stop(layout)
    with router.inside(layout):
        net = Netlink()
    from sandbox.firewall.layout import MARK, TABLE
    from sandbox.host.netlink import Rule

    net.rule(Rule(100, TABLE, mark=MARK), remove=True)
    net.rule(Rule(102, TABLE))
    net.close()


def _policy(**values: Any) -> Weakness:
    return Weakness(policy=lambda policy: policy._replace(**values))


def _limit(name: str, value: int) -> Weakness:
    def change(policy: Policy) -> Policy:
        return policy._replace(
            rlimits=tuple(limit._replace(soft=value, hard=value) if limit.name == name else limit for limit in policy.rlimits)
        )  # fmt: skip

    return Weakness(policy=change)


def _double_pids(policy: Policy) -> Policy:
    """The cgroup's limit and the one per user: each alone would hold."""
    doubled = policy.pids_max + 128
    limits = tuple(l._replace(soft=doubled, hard=doubled) if l.name == "NPROC" else l for l in policy.rlimits)  # noqa: E741
    return policy._replace(pids_max=doubled, rlimits=limits)


def _double_disk(policy: Policy) -> Policy:
    doubled = policy.disk_bytes + 256 * MIB
    limits = tuple(l._replace(soft=doubled, hard=doubled) if l.name == "FSIZE" else l for l in policy.rlimits)  # noqa: E741
    return policy._replace(disk_bytes=doubled, rlimits=limits)


# Rows of calls that pass a filter when nothing else stands before them.
_ALL_CALLS = "PRV-16 PRV-17 PRV-18 KRN-01 KRN-02 KRN-05 KRN-07 KRN-08 KRN-09 KRN-10 KRN-11 KRN-12 KRN-13 KRN-14 KRN-15 KRN-16 KRN-17 KRN-18 KRN-19 KRN-20 KRN-21 KRN-22 KRN-23 KRN-24 KRN-25 KRN-26 KRN-27 FS-04 FS-23 FS-26 NET-09 NET-11 NET-12 NET-13 NET-25 NET-27 PRV-09 PRV-10 PRV-11 PRV-12 PRV-13 PRV-14 PRV-27 RES-14"  # noqa: E501
_NET_K = "NET-29"
_WALLED = "NET-01 NET-02 NET-03 NET-04 NET-05 NET-06 NET-07 NET-08 NET-10 NET-17 NET-19 NET-21 NET-22 NET-24 NET-26 NET-28 NET-29 NET-30"  # noqa: E501

ALL: tuple[Mutant, ...] = (
    Mutant("bare", "no wall but namespaces and cgroup; root with every right", "PRV-01 PRV-02 PRV-03 PRV-10 FS-08",
           may="*", weakness=Weakness(oci=_bare_oci, docker=_bare_docker), gentle=True),
    Mutant("no-seccomp", "no system-call filter", "PRV-10 PRV-11 PRV-13 PRV-16 KRN-22 NET-13 NET-12 KRN-01",
           may=_ALL_CALLS + " PRV-15 PRV-28",
           weakness=Weakness(oci=lambda d: _linux(d).pop("seccomp"), docker=_no_seccomp_docker)),
    Mutant("more-calls", "the filter lets a few dangerous calls pass", "PRV-10 KRN-05 KRN-10 KRN-11 KRN-14 PRV-17",
           may="PRV-18 KRN-13 KRN-25 KRN-24",
           weakness=_allow("setns", "userfaultfd", "bpf", "keyctl", "add_key", "request_key", "ptrace")),
    Mutant("clone-flags", "the filter looks at no clone flags", "PRV-10 KRN-01 KRN-02",
           weakness=_seccomp(_no_flag_checks)),
    Mutant("high-bits", "the filter passes values with high bits", "PRV-10 PRV-14 PRV-27",
           may="NET-12 NET-27 NET-09", weakness=_seccomp(_high_bits)),
    Mutant("foreign-calls", "the filter covers 32-bit and x32 calls instead of ending them", "PRV-10 PRV-11 PRV-13 PRV-12",
           may="NET-09 NET-11 NET-12 NET-13 NET-25 NET-27 PRV-14 KRN-12", weakness=_seccomp(_foreign)),
    Mutant("socket-families", "the filter passes every kind of socket", "PRV-10 NET-12 NET-13 NET-27",
           may="NET-09 NET-11 NET-25 PRV-14", weakness=_seccomp(_families)),
    Mutant("call-arguments", "the filter looks at no socket options, ioctls and personalities",
           "PRV-10 PRV-16 PRV-27 KRN-12", may="PRV-14", weakness=_seccomp(_options)),
    Mutant("file-modes", "the filter looks at no file modes", "PRV-10 PRV-09 FS-04 RES-14", weakness=_seccomp(_modes)),
    Mutant("cap-net-raw", "one capability", "PRV-01", may="PRV-08 NET-15 NET-11", weakness=_capabilities("NET_RAW")),
    Mutant("cap-sys-admin", "the capability that is nearly root", "PRV-01", may="PRV-08 NET-15 KRN-19 KRN-20 PRV-25",
           weakness=_capabilities("SYS_ADMIN")),
    Mutant("no-nnp", "programs may gain rights", "PRV-02",
           weakness=Weakness(oci=_process(noNewPrivileges=False),
                             docker=lambda b: b["HostConfig"].update(
                                 SecurityOpt=[o for o in b["HostConfig"]["SecurityOpt"] if o != "no-new-privileges"]))),
    Mutant("uid-0", "runs as its namespace's root", "PRV-03 IDN-02 PRV-05", may="RES-11 IDN-01 FS-01 NET-16 PRV-29 FS-28 FS-09 KRN-28 FS-22",
           weakness=Weakness(oci=lambda d: d["process"]["user"].update(uid=0, gid=0), docker=lambda b: b.update(User="0:0"))),
    Mutant("no-userns", "no user namespace of its own", "PRV-04 KRN-03", may="PRV-03 KRN-04 FS-02 FS-15 PRV-06 PRV-10",
           engines=("oci",), weakness=Weakness(oci=_no_userns)),
    Mutant("read-write-root", "the base system can be written", "FS-02 PRV-29", live=_writable_root, engines=("docker",), may="FS-01"),
    Mutant("mount-suid", "setuid files in /dev/shm have effect", "FS-02 PRV-06",
           weakness=Weakness(oci=_loose("nosuid", "/dev/shm")), engines=("oci",)),
    Mutant("extra-mount", "/etc of the host, read-only", "FS-02", may="PRV-06 FS-03 FS-12", weakness=_bind("/etc", "/mnt")),
    Mutant("shared-propagation", "a mount that is tied to others", "FS-03 FS-02", live=_shared, groups=()),
    Mutant("device-node", "/dev/mem is there", "FS-05 FS-07 FS-02", may="FS-03 PRV-06", live=_device),
    Mutant("neighbours-files", "the folders of all apps", "FS-13 FS-02", live=_others_files,
           may="FS-03 FS-12 FS-15 FS-14 PRV-06 FS-20 FS-01 FS-16 PRV-28 IDN-05"),
    Mutant("named-folder", "a mount that names a folder of the host", "FS-12 FS-02", live=_named_mount, may="FS-03 PRV-06 FS-14"),
    Mutant("terminals", "more terminals", "RES-10 FS-02", live=_terminals, limits=("handles",), groups=()),
    Mutant("watches", "more file watches", "FS-24", live=_inotify, groups=(), engines=("oci",)),
    Mutant("no-masks", "nothing of /proc is masked or read-only", "FS-08 FS-02 FS-11 FS-09",
           may="FS-10 KRN-28 KRN-29 IDN-03 PRV-06",
           weakness=Weakness(oci=lambda d: _linux(d).update(maskedPaths=[], readonlyPaths=[]),
                             docker=_host_config(MaskedPaths=[], ReadonlyPaths=[]))),
    Mutant("one-mask-off", "one mask is taken off the live twin", "FS-08 FS-02 FS-11", live=_unmask),
    # Not with Docker: its host network is the daemon's, outside of our stage.
    Mutant("host-network", "the host's network", "KRN-06 NET-18", engines=("oci",),
           may=f"{_WALLED} KRN-04 RES-17 RES-18 RES-19 KRN-03 NET-14 LOG-06",
           weakness=Weakness(oci=_oci_namespace("network"))),
    Mutant("missing-mount", "a planned mount is missing", "FS-02 FS-15", may="FS-17 FS-18", groups=(),
           weakness=Weakness(oci=_without_mount, docker=_without_mount_docker)),
    Mutant("host-pids", "the host's processes", "KRN-06 PRV-19",
           may="PRV-04 KRN-03 PRV-03 KRN-04 FS-02 FS-15 PRV-06 PRV-23 PRV-20 PRV-10 PRV-21 IDN-03 FS-27 PRV-29",
           weakness=Weakness(oci=lambda d: (_no_userns(d), _oci_namespace("pid")(d)), docker=_host_config(PidMode="host"))),
    Mutant("host-ipc", "the host's shared memory", "KRN-06", may="KRN-04 FS-02 FS-17 RES-13 KRN-03 PRV-06",
           weakness=Weakness(oci=_oci_namespace("ipc"), docker=_host_ipc_docker)),
    Mutant("control-socket", "a control socket in its files", "FS-14", live=_control_socket),
    Mutant("cgroup-mounted", "its own limits are in its file system", "FS-28 FS-02 RES-20", may="PRV-06 FS-03 FS-12",
           live=_cgroup_inside),
    Mutant("env-leak", "a secret of the supervisor in its variables", "IDN-03",
           weakness=Weakness(oci=lambda d: d["process"]["env"].append(_secret()), docker=lambda b: b["Env"].append(_secret()))),
    Mutant("oom-score", "the kernel kills others first", "PRV-26", engines=("oci", "docker"), weakness=_policy(oom_score=0)),
    Mutant("core-dumps", "core dumps without a limit", "PRV-31", weakness=_limit("CORE", 1 << 30)),
    Mutant("locked-memory", "may pin memory", "RES-14", weakness=_limit("MEMLOCK", 8 * MIB), limits=("handles",)),
    Mutant("open-files", "more open files", "RES-08", may="RES-09", weakness=_limit("NOFILE", 11_000), limits=("handles",)),
    Mutant("queues", "more message queues", "RES-13", weakness=_limit("MSGQUEUE", 8 << 20), limits=("handles",)),
    Mutant("signals", "more pending signals", "RES-12", weakness=_limit("SIGPENDING", 4096), limits=("handles",)),
    Mutant("more-memory", "a raised memory limit", "RES-01", may="RES-02", live=_more_memory, groups=(), limits=("memory",)),
    Mutant("more-swap", "a raised limit on memory and swap", "RES-02", live=_more_swap, groups=()),
    Mutant("more-pids", "a raised process limit", "RES-05 RES-06 PRV-24", groups=(), limits=("processes",),
           weakness=Weakness(policy=_double_pids)),
    Mutant("raised-pids", "the process limit is raised in its cgroup", "RES-05", live=_more_pids, groups=()),
    Mutant("more-cpu", "no CPU cap", "RES-07", may="RES-23", live=_more_cpu, groups=(), limits=("cpu",)),
    Mutant("more-disk", "a larger disk", "FS-17", may="FS-18 FS-19", weakness=Weakness(policy=_double_disk), groups=(), limits=("disk",)),
    Mutant("more-inodes", "more files", "FS-18", may="FS-17", weakness=Weakness(policy=lambda p: p._replace(disk_inodes=p.disk_inodes * 2)), groups=()),
    Mutant("more-shm", "more shared memory", "FS-17", weakness=Weakness(policy=lambda p: p._replace(shm_bytes=p.shm_bytes * 2)), groups=(), limits=("shm",)),
    Mutant("file-size", "files of any size", "FS-19", weakness=_limit("FSIZE", 1 << 41), groups=(), limits=("files",), may="FS-17 FS-18"),
    Mutant("all-devices", "every device may be opened", "FS-06", live=_all_devices, groups=()),
    Mutant("left-the-cgroup", "a process outside of its limits", "PRV-23", may="RES-11", live=_escape, groups=()),
    Mutant("entered", "a process of the host moved in", "PRV-10 PRV-01 PRV-02 PRV-03 PRV-28", live=_entered, groups=(),
           may="RES-11 IDN-01 IDN-02 PRV-26 PRV-31 RES-08 RES-12 RES-13 RES-14 FS-19 PRV-25 IDN-05 PRV-04 PRV-23 IDN-03"),
    Mutant("poisoned-file", "another file in the place of the shell", "FS-21 FS-02", live=_another_shell, groups=(), may="FS-03"),
    Mutant("second-mount", "a mount by nsenter", "FS-02", live=_from_host("/etc", "/mnt"), groups=(), may="FS-03 PRV-06"),
    Mutant("second-interface", "another network card", "NET-01", may=_WALLED, live=_second_way, groups=()),
    Mutant("ipv6-on", "IPv6 is switched on", "NET-01", may=_WALLED, live=_ipv6_on, groups=()),
    Mutant("no-table", "the router's table is deleted", "NET-29 NET-02 NET-03 NET-04 NET-05 NET-06 NET-07 NET-08 NET-21",
           may=f"{_WALLED} RES-17 RES-18 LOG-06", live=_nft("delete table inet sandbox"), groups=()),
    Mutant("no-deny", "the rule that denies inner ranges is gone", "NET-29 NET-03 NET-04 NET-05", may="NET-06 NET-26 NET-02 LOG-06",
           live=_nft(drop=("@deny4",)), groups=(), network=True),
    Mutant("one-range", "one range is no longer denied", "NET-29 NET-04", may="NET-05",
           live=_nft("delete element inet sandbox deny4 {{ 169.254.169.254 }}"), groups=()),
    Mutant("no-host-rule", "the rule that denies this host is gone", "NET-29 NET-02",
           live=_nft(drop=("@hosts4",)), groups=(), network=True),
    Mutant("no-senders", "senders are not looked at", "NET-29 NET-08", live=_nft(drop=("@src4",)), groups=(), network=True),
    Mutant("no-ipv4-rule", "the rule against IPv6 is gone", "NET-29 NET-07", live=_nft(drop=("meta nfproto != ipv4",)), groups=(), network=True, may="NET-08"),
    Mutant("no-mail-rule", "the rule against mail is gone", "NET-29 NET-21", live=_nft(drop=("tcp dport 25",)), groups=(), network=True),
    Mutant("no-rates", "no rate of new flows", "NET-29 NET-22", live=_nft(drop=("@fresh",)), groups=(), network=True),
    Mutant("no-flow-caps", "flows are not counted", "NET-29 RES-17", live=_nft(drop=("ct count over",)), groups=()),
    Mutant("no-flow-limit", "this dyno has no limit on flows", "RES-17 RES-18", may="NET-01", live=_nft("delete element inet sandbox flows_{flows} {{ \"{link}\" }}"), groups=()),
    Mutant("open-inbound", "everybody may connect to it", "NET-29 NET-17",
           live=_nft("insert rule inet sandbox inward accept", 'add element inet sandbox reply4 {{ "{link}" . 9999 }}'), groups=(), network=True),
    Mutant("helper", "a helper that opens ports", "NET-29 NET-24",
           live=_nft('add ct helper inet sandbox ftp {{ type "ftp" protocol tcp; }}\nadd rule inet sandbox rates tcp dport 21 ct helper set "ftp"'), groups=()),
    Mutant("fails-open", "the router routes what no rule has passed", "NET-28", live=_no_routing_rules, groups=(), vanish=True, may="NET-29 NET-23"),
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


def _secret() -> str:
    from sandbox.report.twin import CANARY_VARIABLE, canary

    return f"{CANARY_VARIABLE}={canary()}"


def catches(mutant: Mutant, red: frozenset[str], known: frozenset[str]) -> tuple[list[str], list[str]]:
    """(rows that should have turned red and did not, rows that turned red and should not)."""
    missed = sorted(mutant.must - red)
    if mutant.may == "*":
        return missed, []
    return missed, sorted(red - mutant.allowed - known)

