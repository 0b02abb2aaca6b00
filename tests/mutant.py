"""Runs the command line with one clause of the wall taken out: the control of every security test.

``python tests/mutant.py NAME ARGUMENTS...``; the name ``none`` changes nothing. The product has no such switch.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))


def _edit_oci(edit) -> None:
    from sandbox.policy import oci

    original = oci.config

    def config(spec):
        document = original(spec)
        edit(document)
        return document

    oci.config = config


def _edit_docker(edit) -> None:
    from sandbox.policy import docker_body

    original = docker_body.create_body

    def create_body(spec):
        document = original(spec)
        edit(document["HostConfig"], document)
        return document

    docker_body.create_body = create_body


def no_seccomp() -> None:
    _edit_oci(lambda c: c["linux"].pop("seccomp"))
    _edit_docker(lambda h, _: h.update(SecurityOpt=["no-new-privileges", "seccomp=unconfined"]))


def no_label() -> None:
    _edit_oci(lambda c: c["process"].pop("apparmorProfile"))
    _edit_docker(lambda h, _: h.update(SecurityOpt=[*h["SecurityOpt"][:2], "apparmor=unconfined"]))


def no_mask() -> None:
    _edit_oci(lambda c: c["linux"].update(maskedPaths=[], readonlyPaths=[]))
    _edit_docker(lambda h, _: h.update(MaskedPaths=[], ReadonlyPaths=[]))


def no_nnp() -> None:
    _edit_oci(lambda c: c["process"].update(noNewPrivileges=False))
    _edit_docker(lambda h, _: h.update(SecurityOpt=[o for o in h["SecurityOpt"] if o != "no-new-privileges"]))


def rw_root() -> None:
    """The root file system is writable, on a fresh upper; only Docker has one to give."""
    _edit_docker(lambda h, _: h.update(ReadonlyRootfs=False))


def no_root_guard() -> None:
    """Docker's own root mount is left as Docker made it."""
    from sandbox.host import inside

    inside.restrict_engine_mounts = lambda *_, **__: None


def cap_net_raw() -> None:
    caps = ["CAP_NET_RAW"]
    _edit_oci(
        lambda c: c["process"].update(
            capabilities=dict.fromkeys(("bounding", "effective", "permitted", "inheritable", "ambient"), caps)
        )
    )
    _edit_docker(lambda h, _: h.update(CapAdd=["NET_RAW"]))


def uid_0() -> None:
    _edit_oci(lambda c: c["process"]["user"].update(uid=0, gid=0))
    _edit_docker(lambda _, d: d.update(User="0:0"))


def host_pid() -> None:
    _edit_oci(lambda c: c["linux"].update(namespaces=[n for n in c["linux"]["namespaces"] if n["type"] != "pid"]))
    _edit_docker(lambda h, _: h.update(PidMode="host"))


def host_ipc() -> None:
    _edit_oci(lambda c: c["linux"].update(namespaces=[n for n in c["linux"]["namespaces"] if n["type"] != "ipc"]))
    _edit_docker(lambda h, _: (h.update(IpcMode="host"), h.pop("Tmpfs")))


def host_net() -> None:
    _edit_oci(lambda c: c["linux"].update(namespaces=[n for n in c["linux"]["namespaces"] if n["type"] != "network"]))
    # The host's own switches are no container's to set.
    _edit_docker(lambda h, _: (h.update(NetworkMode="host"), h.pop("Sysctls")))


def host_uts() -> None:
    _edit_oci(
        lambda c: (
            c.pop("hostname"),
            c["linux"].update(namespaces=[n for n in c["linux"]["namespaces"] if n["type"] != "uts"]),
        )
    )
    _edit_docker(lambda h, d: (h.update(UTSMode="host"), d.pop("Hostname")))


def extra_bind() -> None:
    _edit_oci(
        lambda c: c["mounts"].append(
            {"destination": "/mnt", "type": "bind", "source": "/etc", "options": ["bind", "ro"]}
        )
    )
    _edit_docker(
        lambda h, _: h["Mounts"].append({"Type": "bind", "Source": "/etc", "Target": "/mnt", "ReadOnly": True})
    )


def more_memory() -> None:
    _edit_oci(lambda c: c["linux"]["resources"]["memory"].update(limit=2 << 30, swap=2 << 30))
    _edit_docker(lambda h, _: h.update(Memory=2 << 30, MemorySwap=2 << 30))


def more_pids() -> None:
    _edit_oci(lambda c: c["linux"]["resources"]["pids"].update(limit=4000))
    _edit_docker(lambda h, _: h.update(PidsLimit=4000))


def more_cpu() -> None:
    _edit_oci(lambda c: c["linux"]["resources"]["cpu"].update(quota=200_000))
    _edit_docker(lambda h, _: h.update(CpuQuota=200_000))


def all_devices() -> None:
    _edit_oci(lambda c: c["linux"]["resources"].update(devices=[{"allow": True, "access": "rwm"}]))
    _edit_docker(lambda h, _: h.update(DeviceCgroupRules=["c 10:* rwm"]))


def big_shm() -> None:
    _edit_oci(
        lambda c: [
            m.update(options=["nosuid", "nodev", "noexec", "mode=1777"])
            for m in c["mounts"]
            if m["destination"] == "/dev/shm"
        ]
    )
    _edit_docker(lambda h, _: h.update(Tmpfs={"/dev/shm": "rw,nosuid,nodev,noexec,mode=1777"}))


def no_rlimits() -> None:
    from sandbox.policy import oci

    oci.shim_limits = lambda _: []
    _edit_docker(lambda h, _: h.update(Ulimits=[]))


def no_oom_score() -> None:
    _edit_oci(lambda c: c["process"].update(oomScoreAdj=0))
    _edit_docker(lambda h, _: h.update(OomScoreAdj=0))


def no_quota() -> None:
    """The dyno's writable folders are the host's file system instead of its own image."""
    from sandbox.host import disk

    original = disk.mount_image

    def mount_image(image, target, fstype, **more):
        if fstype != "ext4":
            return original(image, target, fstype, **more)
        for folder in (
            "upper",
            "work",
            "tmp",
            "vartmp",
            "fixed/empty",
            "fixed/gate",
            "fixed/etc",
            "fixed/sys/fs/cgroup/memory",
            "fixed/sys/devices/system/cpu",
        ):
            Path(target, folder).mkdir(parents=True)
        return None

    disk.mount_image = mount_image
    _clean_tree(disk)


def _clean_tree(disk) -> None:
    import shutil

    original = disk.remove_tree

    def remove_tree(path):
        for name in ("disk",):
            shutil.rmtree(f"{path}/{name}", ignore_errors=True)
        original(path)

    disk.remove_tree = remove_tree


def no_init() -> None:
    from sandbox.policy import spec

    spec.INIT = spec.INIT[2:]


def leaky() -> None:
    """The shim gets a descriptor of a host folder that is not closed on exec."""
    from sandbox.engine import oci

    fd = os.open("/etc", os.O_RDONLY)
    os.set_inheritable(fd, True)
    os.dup2(fd, 3)
    original = oci.subprocess.Popen
    oci.subprocess.Popen = lambda argv, **more: original(
        [*argv[: -0 or None]], **{**more, "pass_fds": (*more["pass_fds"], 3)}
    )


def docker_lacks_pids() -> None:
    """A Docker whose host has no pids controller says so in /info."""
    import docker

    original = docker.APIClient.info
    docker.APIClient.info = lambda self: {**original(self), "PidsLimit": False}


def no_runtime() -> None:
    """A host without runc, crun and runsc."""
    from sandbox import hostcmd

    original = hostcmd.which
    hostcmd.which = lambda program: None if program in ("runc", "crun", "runsc") else original(program)


def all_caps() -> None:
    _edit_docker(lambda h, _: h.update(CapDrop=[], CapAdd=["SETUID", "SETGID", "SYS_NICE"]))


def setuid_slug() -> None:
    """Packs the slug with a setuid bit that belongs to another id: as if checking and stripping were not there."""
    from sandbox.app import slug

    original, run = slug.pack, slug.hostcmd.run

    def pack(config, tree, key):
        helper = Path(tree, "helper")
        os.chown(helper, 7, 7)
        os.chmod(helper, 0o4755)
        slug.hostcmd.run = lambda argv, **more: run(
            [a for a in argv if a not in ("-force-uid", "-force-gid", "1000")], **more
        )
        return original(config, tree, key + "s" * 8)

    slug.pack = pack
    slug.find = lambda *_: None


def suid_mounts() -> None:
    """No mount is nosuid."""
    from sandbox.host import disk, inside, syscalls

    syscalls.ATTR_NOSUID = 0
    disk._GUARDED = 0
    inside.restrict_engine_mounts = lambda *_, **__: None
    _edit_oci(lambda c: [m.update(options=[o for o in m["options"] if o != "nosuid"]) for m in c["mounts"]])


def root_creates() -> None:
    """Root makes every user namespace, as runc would by itself."""
    from sandbox.host import syscalls

    original = syscalls.user_namespace
    syscalls._USERNS_LIMITS.clear()
    syscalls.user_namespace = lambda base, *, owner, count=65536: original(base, owner=0, count=count)


def shared_stack() -> None:
    """The stack is mounted as it is, without a layer of the dyno's own."""
    from sandbox.host import disk

    original = disk._overlay

    def overlay(folder, target, layers):
        if target == "root":
            disk.sys.clone_mount(f"{folder}/stack", f"{folder}/root", attributes=disk.sys.ATTR_RDONLY)
        else:
            original(folder, target, layers)

    disk._overlay = overlay


def no_tcp_limit() -> None:
    from sandbox.dyno import verify
    from sandbox.host.cgroup import Cgroup

    Cgroup.limit_tcp = lambda *_: None
    verify.CHECKS.pop(verify.Clause.MEMORY)


def no_verify() -> None:
    from sandbox.dyno import verify

    verify.differences = lambda _: []


def no_deny() -> None:
    """The router has no rule that looks at destinations, and the host's own table lets everything in."""
    from sandbox.firewall import ruleset

    router, host = ruleset.router, ruleset.host
    gone = ("meta mark set ip daddr map @deny4 goto deny", "ip daddr @hosts4 meta mark set 1 goto deny")

    def without(*arguments):
        filled, rules = router(*arguments)
        assert all(text in rules for text in gone)
        return filled, rules.replace(gone[0], "").replace(gone[1], "")

    ruleset.router = without
    ruleset.host = lambda *a: host(*a).replace("fib daddr type != unicast counter drop", "")


def late_wall() -> None:
    """The deny rule comes 300 ms after the app, as where rules are installed once the process is there."""
    import threading
    import time

    from sandbox.dyno import dyno
    from sandbox.firewall import router
    from sandbox.firewall.layout import Layout
    from sandbox.host.nft import Nft

    no_deny()
    start, opened, layouts = dyno.Dyno.start, dyno._open_gate, []

    def started(self, **more):
        layouts.append(Layout(self._config))
        return start(self, **more)

    def later() -> None:
        time.sleep(0.3)
        with router.inside(layouts[0]):
            Nft().run("insert rule inet sandbox from_dyno meta mark set ip daddr map @deny4 goto deny")

    def open_gate(*arguments):
        opened(*arguments)
        threading.Thread(target=later).start()

    dyno.Dyno.start, dyno._open_gate = started, open_gate


def die_in_take_down() -> None:
    """SIGKILL to ourselves in the middle of taking the router down."""
    from sandbox.host.netlink import Netlink

    original = Netlink.remove_link

    def remove_link(self, name):
        original(self, name)
        os.kill(os.getpid(), signal.SIGKILL)

    Netlink.remove_link = remove_link


def nft_missing() -> None:
    from sandbox.errors import HostError
    from sandbox.host import nft

    def library():
        raise HostError("libnftables is not installed.", hint="apt-get install nftables")

    nft._library = library


def _nft_fails(when) -> None:
    from sandbox.host import nft

    original = nft.Nft.run

    def run(self, text, *, flags=0):
        if when(text):
            text += "add element inet sandbox no_such_set { 1 }\n"
        return original(self, text, flags=flags)

    nft.Nft.run = run


def nft_refuses() -> None:
    """The kernel refuses the transaction that admits the dyno."""
    _nft_fails(lambda text: text.startswith("add element inet sandbox src4"))


def set_full() -> None:
    """There is room for no dyno at all in one of the sets."""
    from sandbox.firewall import ruleset

    router = ruleset.router

    def full(*arguments):
        filled, rules = router(*arguments)
        roomy = "set src4 { type ifname . ipv4_addr; size 65535; counter; }"
        assert roomy in filled
        tight = 'set src4 { type ifname . ipv4_addr; size 1; counter; elements = { "full" . 192.0.2.1 } }'
        return filled.replace(roomy, tight), rules

    ruleset.router = full


def veth_gone() -> None:
    """The link disappears between the wiring and the verdict."""
    from sandbox.firewall import admit, router
    from sandbox.host.netlink import Netlink

    connect = admit.connect

    def connected(config, place, namespace):
        connect(config, place, namespace)
        layout = admit.Layout(config)
        with router.inside(layout):
            net = Netlink()
        net.remove_link(router.read_record(layout.record(place.address))["link"])

    admit.connect = connected


def no_source_element() -> None:
    """The element that says which address is its own is lost before the verdict."""
    from sandbox.firewall import admit, router
    from sandbox.host.nft import Nft

    connect = admit.connect

    def connected(config, place, namespace):
        connect(config, place, namespace)
        layout = admit.Layout(config)
        record = router.read_record(layout.record(place.address))
        with router.inside(layout):
            Nft().run(f'delete element inet sandbox src4 {{ "{record["link"]}" . {place.address} }}')

    admit.connect = connected


def ipv6_stays_on() -> None:
    from sandbox.host import netns

    original = netns.write_sysctl
    netns.write_sysctl = lambda name, value: original(name, "0" if "eth0/disable_ipv6" in name else value)
    from sandbox.firewall import admit

    own = admit._own_side

    def side(net, place):
        own(net, place)
        import time

        time.sleep(2.5)  # until duplicate address detection has made the address a real one

    admit._own_side = side


def no_dnsmasq() -> None:
    from sandbox import hostcmd

    original = hostcmd.which
    hostcmd.which = lambda program: None if program == "dnsmasq" else original(program)


def dead_resolver() -> None:
    """The guard's process cannot start."""
    from sandbox import hostcmd

    original = hostcmd.spawn
    hostcmd.spawn = lambda argv, **more: original(["/bin/false"], **more)


def die_at() -> None:
    """SIGKILL to ourselves at the N-th step: right after a step was written down, or right after it was undone."""
    from sandbox.dyno import slot
    from sandbox.host.journal import Journal

    wanted = int(os.environ["DIE_AT"])
    count = 0

    def step(what: str) -> None:
        nonlocal count
        count += 1
        print(f"step {count}: {what}", file=sys.stderr, flush=True)
        if count == wanted:
            os.kill(os.getpid(), signal.SIGKILL)

    record = Journal.record

    def recorded(self, op, name, **more):
        record(self, op, name, **more)
        step(f"before {op} {name}")

    Journal.record = recorded
    undo = slot._UNDO

    def wrap(op, function):
        def undone(*arguments):
            function(*arguments)
            step(f"after undoing {op}")

        return undone

    slot._UNDO = {op: wrap(op, function) for op, function in undo.items()}
    from sandbox.dyno import dyno

    for name in ("_reach_gate", "_open_gate"):
        original = getattr(dyno, name)

        def after(*arguments, original=original, name=name):
            result = original(*arguments)
            step(f"after {name}")
            return result

        setattr(dyno, name, after)


def no_mapped_squashfs() -> None:
    """As on Linux before 6.2."""
    from sandbox.host import disk

    disk._MAPPED_SQUASHFS = (99, 0)


def main() -> None:
    names = [name.replace("-", "_") for name in sys.argv[1].split("+")]
    for name in names:
        if name != "none":
            globals()[name]()
    sys.argv = ["sandbox", *sys.argv[2:]]
    from sandbox.cli.entry import main as entry

    entry()


if __name__ == "__main__":
    main()
