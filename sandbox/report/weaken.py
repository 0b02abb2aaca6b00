"""Ways to take one clause out of a twin's wall: in what an engine is asked for, in the policy, or in the live twin."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from typing import Any

from sandbox.firewall import admit, guard, router
from sandbox.firewall.layout import Layout
from sandbox.host import inside, netns
from sandbox.host import syscalls as sys
from sandbox.host.netlink import Netlink
from sandbox.host.nft import Nft
from sandbox.policy.policy import Policy, Rlimit
from sandbox.report.twin import Edit, Twin, Weakness
from sandbox.units import MIB

Json = dict[str, Any]


# ---- documents


def linux(document: Json) -> Json:
    found: Json = document["linux"]
    return found


def no_seccomp_docker(body: Json) -> None:
    body["HostConfig"]["SecurityOpt"] = ["no-new-privileges", "seccomp=unconfined"]


def seccomp(change: Edit) -> Weakness:
    """The filter with a change, in both engines' documents."""
    import json

    def docker(body: Json) -> None:
        options = body["HostConfig"]["SecurityOpt"]
        for index, option in enumerate(options):
            if option.startswith("seccomp="):
                profile = json.loads(option.removeprefix("seccomp="))
                change(profile)
                options[index] = "seccomp=" + json.dumps(profile)

    return Weakness(oci=lambda document: change(linux(document)["seccomp"]), docker=docker)


def allow(*calls: str) -> Weakness:
    return seccomp(lambda profile: profile["syscalls"].append({"names": list(calls), "action": "SCMP_ACT_ALLOW"}))


def no_flag_checks(profile: Json) -> None:
    """``clone`` passes whatever its flags are."""
    profile["syscalls"] = [entry for entry in profile["syscalls"] if entry["names"] != ["clone"]]
    profile["syscalls"].append({"names": ["clone", "unshare"], "action": "SCMP_ACT_ALLOW"})


def high_bits(profile: Json) -> None:
    """As a careless list of refused values would: what has high bits is none of them."""
    for name, index in (("socket", 0), ("ioctl", 1)):
        profile["syscalls"].append(
            {
                "names": [name],
                "action": "SCMP_ACT_ALLOW",
                "args": [{"index": index, "value": 1 << 32, "valueTwo": 1 << 32, "op": "SCMP_CMP_MASKED_EQ"}],
            }
        )


def foreign(profile: Json) -> None:
    # 32-bit programs have one call for all that sockets do: libseccomp takes no conditions on a part of it.
    plain = {"socket", "socketpair", "setsockopt", "shmget"}
    profile["syscalls"] = [entry for entry in profile["syscalls"] if not set(entry["names"]) <= plain]
    profile["syscalls"].append({"names": sorted(plain), "action": "SCMP_ACT_ALLOW"})
    profile["architectures"] = ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]


def families(profile: Json) -> None:
    profile["syscalls"] = [entry for entry in profile["syscalls"] if entry["names"] != ["socket"]]
    profile["syscalls"].append({"names": ["socket"], "action": "SCMP_ACT_ALLOW"})


def options(profile: Json) -> None:
    kept = [
        entry for entry in profile["syscalls"] if entry["names"] not in (["setsockopt"], ["ioctl"], ["personality"])
    ]
    profile["syscalls"] = [*kept, {"names": ["setsockopt", "ioctl", "personality"], "action": "SCMP_ACT_ALLOW"}]


def modes(profile: Json) -> None:
    names = ("chmod", "fchmod", "fchmodat", "creat", "open", "openat", "mknod", "mknodat", "mmap")
    kept = [entry for entry in profile["syscalls"] if not set(entry["names"]) <= set(names)]
    profile["syscalls"] = [*kept, {"names": list(names), "action": "SCMP_ACT_ALLOW"}]


_SETS = ("bounding", "effective", "permitted", "inheritable", "ambient")


def capabilities(*names: str) -> Weakness:
    def oci(document: Json) -> None:
        document["process"]["capabilities"] = {key: [f"CAP_{name}" for name in names] for key in _SETS}

    def docker(body: Json) -> None:
        body["HostConfig"]["CapAdd"] = list(names)
        # Only root gets them into its effective set; an app's id keeps them in the bounding set alone.

    return Weakness(oci=oci, docker=docker)


def oci_namespace(kind: str) -> Edit:
    def edit(document: Json) -> None:
        found = linux(document)
        found["namespaces"] = [entry for entry in found["namespaces"] if entry["type"] != kind]

    return edit


def no_userns(document: Json) -> None:
    """As before user namespaces: ids inside are ids of the host."""
    found = linux(document)
    base = int(found["uidMappings"][0]["hostID"])
    oci_namespace("user")(document)
    found.pop("uidMappings")
    found.pop("gidMappings")
    document["process"]["user"].update(uid=base + 1000, gid=base + 1000)
    # Without one, these would be mounted with other owners; they are not what is looked at.
    document["mounts"] = [m for m in document["mounts"] if m["destination"] != "/dev/mqueue"]


def without_mount(document: Json) -> None:
    document["mounts"] = [mount for mount in document["mounts"] if mount["destination"] != "/var/tmp"]


def without_mount_docker(body: Json) -> None:
    mounts = body["HostConfig"]["Mounts"]
    body["HostConfig"]["Mounts"] = [mount for mount in mounts if mount["Target"] != "/var/tmp"]


def host_pids(document: Json) -> None:
    """A proc of the host's namespace cannot be mounted from a user namespace of its own: both go."""
    no_userns(document)
    oci_namespace("pid")(document)


def host_ipc_docker(body: Json) -> None:
    body["HostConfig"]["IpcMode"] = "host"
    body["HostConfig"].pop("Tmpfs")


def bind(source: str, target: str) -> Weakness:
    def oci(document: Json) -> None:
        document["mounts"].append({"destination": target, "type": "bind", "source": source, "options": ["bind", "ro"]})

    def docker(body: Json) -> None:
        body["HostConfig"]["Mounts"].append({"Type": "bind", "Source": source, "Target": target, "ReadOnly": True})

    return Weakness(oci=oci, docker=docker)


def process(**values: Any) -> Edit:
    return lambda document: document["process"].update(values)


def host_config(**values: Any) -> Edit:
    return lambda body: body["HostConfig"].update(values)


def loose(flag: str, target: str) -> Edit:
    def edit(document: Json) -> None:
        for mount in document["mounts"]:
            if mount["destination"] == target:
                mount["options"] = [option for option in mount["options"] if option != flag]

    return edit


def bare_oci(document: Json) -> None:
    """No wall but the namespaces and the cgroup: what an attack looks like when it works."""
    found = linux(document)
    oci_namespace("user")(document)
    for key in ("uidMappings", "gidMappings", "seccomp"):
        found.pop(key, None)
    found.update(maskedPaths=[], readonlyPaths=[])
    document["root"]["readonly"] = False
    document["process"].update(noNewPrivileges=False, oomScoreAdj=0)
    document["process"].pop("apparmorProfile", None)
    document["process"]["user"].update(uid=0, gid=0)
    document["process"]["capabilities"] = dict.fromkeys(_SETS, _own_capabilities())
    found["resources"]["devices"] = [{"allow": True, "access": "rwm"}]
    document["mounts"] = [
        mount for mount in document["mounts"] if mount["destination"] not in ("/sys", "/sys/fs/cgroup", "/dev/mqueue")
    ]
    document["mounts"].append({"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["rw"]})


def bare_docker(body: Json) -> None:
    body["User"] = "0:0"
    body["HostConfig"].update(
        CapDrop=[], OomScoreAdj=0,
        # Docker 20.10 does not know the three newest.
        CapAdd=[n.removeprefix("CAP_") for n in _own_capabilities() if not n.endswith(("_PERFMON", "_BPF", "_RESTORE"))],
        SecurityOpt=["seccomp=unconfined", "apparmor=unconfined"], ReadonlyRootfs=False, MaskedPaths=[], ReadonlyPaths=[],
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


def more_memory(twin: Twin) -> None:
    most = str(twin.wanted.policy.memory_max_bytes + 128 * MIB)
    if twin.cgroup.is_v2:
        _write(twin, "", "memory.max", most)
    else:
        _write(twin, "memory", "memory.memsw.limit_in_bytes", most)
        _write(twin, "memory", "memory.limit_in_bytes", most)


def more_swap(twin: Twin) -> None:
    most = str(twin.wanted.policy.memory_swap_max_bytes + 128 * MIB)
    if twin.cgroup.is_v2:
        _write(twin, "", "memory.swap.max", most)
    else:
        _write(twin, "memory", "memory.memsw.limit_in_bytes", most)


def more_pids(twin: Twin) -> None:
    _write(twin, "pids", "pids.max", str(twin.wanted.policy.pids_max + 128))


def more_cpu(twin: Twin) -> None:
    if twin.cgroup.is_v2:
        _write(twin, "", "cpu.max", "max 100000")
    else:
        _write(twin, "cpu", "cpu.cfs_quota_us", "-1")


def all_devices(twin: Twin) -> None:
    _write(twin, "devices", "devices.allow", "a")


def escape(twin: Twin) -> None:
    """A process of the twin leaves its cgroup, by the host's hand."""
    child = next(pid for pid in twin.cgroup.pids() if pid != twin.pid)
    for path in set(twin.cgroup.paths.values()):
        above = os.path.dirname(path)
        try:
            with open(f"{above}/cgroup.procs", "w", encoding="ascii") as file:
                file.write(str(child))
        except OSError:
            continue


def entered(twin: Twin) -> None:
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

    def change() -> None:
        sys.setns(fd, sys.CLONE_NEWNS)
        action()

    with admit.os_open(f"/proc/{twin.pid}/ns/mnt") as fd:
        inside.in_child(change, "the change of its mounts")


def from_host(source: str, target: str) -> Callable[[Twin], None]:
    """A folder of the host appears in the live twin."""

    def live(twin: Twin) -> None:
        tree = sys.take_tree(source)
        try:
            _in_its_mounts(twin, lambda: sys.put_tree(tree, target))
        finally:
            os.close(tree)

    return live


def cgroup_inside(twin: Twin) -> None:
    from_host("/sys/fs/cgroup" if twin.cgroup.is_v2 else "/sys/fs/cgroup/pids", "/mnt")(twin)


def another_shell(twin: Twin) -> None:
    _in_its_mounts(twin, lambda: sys.mount("/usr/bin/env", "/usr/bin/bash", "", sys.MS_BIND))


def shared(twin: Twin) -> None:
    _in_its_mounts(twin, lambda: sys.mount("", "/tmp", "", sys.MS_SHARED))


def unmask(twin: Twin) -> None:
    """One mask comes off: the dyno sees the host's file below it."""
    _in_its_mounts(twin, lambda: sys.umount("/proc/cmdline", detach=True))


def device(twin: Twin) -> None:
    """A device of the host in the twin's /dev: bound, since on a file system of its own ids root may make none."""
    owner = os.stat(f"/proc/{twin.pid}/root/dev").st_uid

    def file() -> None:
        os.setresgid(owner, owner, owner)
        os.setresuid(owner, owner, owner)
        os.close(os.open("/dev/mem", os.O_WRONLY | os.O_CREAT, 0o600))

    _in_its_mounts(twin, file)
    from_host("/dev/loop-control", "/dev/mem")(twin)


def writable_root(twin: Twin) -> None:
    flags = sys.MS_REMOUNT | sys.MS_BIND | sys.MS_NOSUID | sys.MS_NODEV
    _in_its_mounts(twin, lambda: sys.mount("", "/", "", flags))


def others_files(twin: Twin) -> None:
    """The host's own folder, with every app's files below it, at the path that it has on the host."""
    top = "/" + twin.config.state_dir.split("/")[1]
    from_host(top, top)(twin)


def named_mount(twin: Twin) -> None:
    from_host(twin.config.state_dir, "/mnt")(twin)


def terminals(twin: Twin) -> None:
    flags = sys.MS_REMOUNT | sys.MS_NOSUID | sys.MS_NOEXEC
    options = "ptmxmode=0666,mode=0620,gid=5,max=96"
    _in_its_mounts(twin, lambda: sys.mount("devpts", "/dev/pts", "devpts", flags, options))


def inotify(twin: Twin) -> None:
    """The limit inside its user namespace is raised by root of that namespace."""

    def change() -> None:
        sys.setns(fd, sys.CLONE_NEWUSER)
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        with open("/proc/sys/user/max_inotify_instances", "w", encoding="ascii") as file:
            file.write("100000")

    with admit.os_open(f"/proc/{twin.pid}/ns/user") as fd:
        inside.in_child(change, "raising the limit")


def control_socket(twin: Twin) -> None:
    """A socket of the host's root lies where the twin can see it."""
    folder = os.open(f"{twin.record.spec.paths.disk}/tmp", os.O_PATH | os.O_CLOEXEC)
    with socket.socket(socket.AF_UNIX) as link:
        # The path of a Unix socket has at most 107 bytes; a folder's descriptor has few.
        link.bind(f"/proc/self/fd/{folder}/control.sock")
    os.close(folder)


def nft(*texts: str, drop: tuple[str, ...] = ()) -> Callable[[Twin], None]:
    """Changes in the twins' router, with nobody there who would repair them. ``drop``: rules that contain a text."""

    def live(twin: Twin) -> None:
        layout = Layout(twin.config)
        guard.stop(layout)
        with router.inside(layout):
            nft = Nft()
        for text in texts:
            nft.run(text.format(link=twin.link, flows=twin.wanted.policy.traffic.flows))
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


def second_way(twin: Twin) -> None:
    """A second interface in the twin's namespace, with its own way out."""
    with admit.os_open(twin.netns) as fd:
        net = Netlink()
        net.veth("stray0", b"\2\0\0\0\0\x0a", group=0, peer="eth1", peer_mac=b"\2\0\0\0\0\x0b", peer_netns=fd, flags=0)
        net.close()


def ipv6_on(twin: Twin) -> None:
    with admit.os_open(twin.netns) as fd, netns.entered(fd):
        netns.write_sysctl("ipv6/conf/eth0/disable_ipv6", "0")
        netns.write_sysctl("ipv6/conf/all/disable_ipv6", "0")


def no_routing_rules(twin: Twin) -> None:
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


def policy(**values: Any) -> Weakness:
    return Weakness(policy=lambda policy: policy._replace(**values))


def _limits(policy: Policy, name: str, value: int) -> tuple[Rlimit, ...]:
    return tuple(each._replace(soft=value, hard=value) if each.name == name else each for each in policy.rlimits)


def limit(name: str, value: int) -> Weakness:
    return Weakness(policy=lambda policy: policy._replace(rlimits=_limits(policy, name, value)))


def double_pids(policy: Policy) -> Policy:
    """The cgroup's limit and the one per user: each alone would hold."""
    doubled = policy.pids_max + 128
    return policy._replace(pids_max=doubled, rlimits=_limits(policy, "NPROC", doubled))


def double_disk(policy: Policy) -> Policy:
    doubled = policy.disk_bytes + 256 * MIB
    return policy._replace(disk_bytes=doubled, rlimits=_limits(policy, "FSIZE", doubled))


def secret() -> str:
    from sandbox.report.twin import CANARY_VARIABLE, canary

    return f"{CANARY_VARIABLE}={canary()}"
