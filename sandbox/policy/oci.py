"""Compiles a policy to the configuration of an OCI bundle (runtime specification 1.0.2). Pure.

Resource limits are not in it: runc sets them with prlimit(2) on its child, which the kernel allows to the owner of
the child's user namespace or to CAP_SYS_RESOURCE of the parent one. Ours is owned by the dyno's own id, and not
every host root has that capability. ``shim_limits`` gives them to the shim instead; everything below inherits them.
"""

from __future__ import annotations

from sandbox.policy import mounts, seccomp
from sandbox.policy.clauses import Clause
from sandbox.policy.mounts import Mount, Source
from sandbox.policy.policy import CPU_PERIOD_US, Policy
from sandbox.policy.spec import APP_UID, UIDS_PER_DYNO, ContainerSpec

Json = dict[str, object]


def config(spec: ContainerSpec) -> Json:
    """The content of ``config.json``."""
    policy = spec.policy
    app_uid = APP_UID if spec.userns_path else spec.host_uid
    return {
        "ociVersion": "1.0.2",
        "hostname": spec.hostname,
        "root": {"path": spec.paths.root, "readonly": True},
        "process": {
            "terminal": spec.tty,
            "user": {"uid": app_uid, "gid": app_uid, "umask": 0o077},
            "args": list(spec.argv),
            "env": list(spec.env),
            "cwd": "/app",
            "capabilities": {},
            "noNewPrivileges": True,
            "oomScoreAdj": policy.oom_score,
            **({"apparmorProfile": spec.label} if spec.label else {}),
        },
        "mounts": [_mount(mount, spec) for mount in mounts.PLAN if _is_wanted(mount, spec)],
        "linux": {
            "namespaces": _namespaces(spec),
            **_mappings(spec),
            "cgroupsPath": spec.cgroup,
            "resources": _resources(policy),
            "seccomp": seccomp.document(),
            "maskedPaths": list(mounts.MASKED),
            "readonlyPaths": list(mounts.READ_ONLY),
            # Recursive: under systemd every mount of the host is shared, and what is bound from one stays tied to it.
            "rootfsPropagation": "rprivate",
        },
    }


def shim_limits(policy: Policy) -> list[str]:
    """The arguments of prlimit(1) that start the shim under the dyno's resource limits."""
    return [f"--{limit.name.lower()}={limit.soft}:{limit.hard}" for limit in policy.rlimits]


def _namespaces(spec: ContainerSpec) -> list[Json]:
    kinds: list[Json] = [{"type": kind} for kind in ("pid", "mount", "ipc", "uts", "cgroup", "network")]
    if spec.userns_path:
        kinds.append({"type": "user", "path": spec.userns_path})
    return kinds


def _mappings(spec: ContainerSpec) -> Json:
    if not spec.userns_path:
        return {}
    rows = [{"containerID": 0, "hostID": spec.uid_base, "size": UIDS_PER_DYNO}]
    return {"uidMappings": rows, "gidMappings": rows}


def _is_wanted(mount: Mount, spec: ContainerSpec) -> bool:
    """GVisor's file server needs every mount point in the read-only root, and mounts no mqueue that we had to hide."""
    inner = mount.target in ("/dev/mqueue", "/sys/fs/cgroup")
    return mount.source is not Source.STACK and not (inner and not spec.userns_path)


def _mount(mount: Mount, spec: ContainerSpec) -> Json:
    flags = ["nosuid", *(() if mount.exec else ("noexec",)), *(("ro",) if mount.read_only else ())]
    match mount.source:
        case Source.PROC:
            return {"destination": mount.target, "type": "proc", "source": "proc", "options": [*flags, "nodev"]}
        case Source.DEV:
            options = [*flags, "strictatime", "mode=755", "size=65536", "nr_inodes=256"]
            return {"destination": mount.target, "type": "tmpfs", "source": "tmpfs", "options": options}
        case Source.DEVPTS:
            options = [*flags, "newinstance", "ptmxmode=0666", "mode=0620", "gid=5", f"max={mounts.MAX_TERMINALS}"]
            return {"destination": mount.target, "type": "devpts", "source": "devpts", "options": options}
        case Source.SHM:
            policy = spec.policy
            size = [f"size={policy.shm_bytes}", f"nr_inodes={policy.shm_inodes}", "mode=1777"]
            options = [*flags, "nodev", *size]
            return {"destination": mount.target, "type": "tmpfs", "source": "tmpfs", "options": options}
        case _:
            options = ["bind", "private", "nodev", *flags]
            return {"destination": mount.target, "type": "bind", "source": bind_source(mount, spec), "options": options}


def bind_source(mount: Mount, spec: ContainerSpec) -> str:
    """The host path behind a mount that is a bind; its flags are already those of the plan."""
    base = {Source.APP: spec.paths.app, Source.DISK: spec.paths.disk, Source.FIXED: spec.paths.fixed}[mount.source]
    return f"{base}/{mount.path}" if mount.path else base


def _resources(policy: Policy) -> Json:
    resources: Json = {}
    if policy.holds(Clause.DEVICES):
        # Everything is denied first; the runtime itself adds the default devices, /dev/pts and /dev/ptmx.
        resources["devices"] = [{"allow": False, "access": "rwm"}]
    if policy.holds(Clause.MEMORY):
        memory: Json = {"limit": policy.memory_max_bytes, "reservation": policy.memory_quota_bytes}
        if policy.holds(Clause.SWAP):
            memory["swap"] = policy.memory_swap_max_bytes
        resources["memory"] = memory
    if policy.holds(Clause.PIDS):
        resources["pids"] = {"limit": policy.pids_max}
    if policy.holds(Clause.CPU):
        cpu: Json = {"shares": policy.cpu_shares}
        if policy.cpu_quota_us:
            cpu |= {"quota": policy.cpu_quota_us, "period": CPU_PERIOD_US}
        resources["cpu"] = cpu
    return resources
