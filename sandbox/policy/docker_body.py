"""Compiles a policy to the body of Docker's ``POST /containers/create`` (API 1.41 and newer). Pure."""

from __future__ import annotations

import json

from sandbox.policy import mounts, seccomp
from sandbox.policy.clauses import Clause
from sandbox.policy.mounts import Source
from sandbox.policy.oci import Json, bind_source
from sandbox.policy.policy import CPU_PERIOD_US, Policy
from sandbox.policy.spec import ContainerSpec

LABEL = "sandbox.container"


def create_body(spec: ContainerSpec) -> Json:
    """The whole request body; nothing of it is left to a default of the daemon."""
    user = f"{spec.host_uid}:{spec.host_uid}"
    return {
        "Image": spec.stack_image,
        "Hostname": spec.hostname,
        "User": user,
        "WorkingDir": "/app",
        "Entrypoint": list(spec.argv),
        "Cmd": [],
        "Env": list(spec.env),
        "Tty": spec.tty,
        "OpenStdin": spec.stdin,
        "StdinOnce": spec.stdin,
        "AttachStdin": spec.stdin,
        "AttachStdout": True,
        "AttachStderr": True,
        "NetworkDisabled": False,
        "StopSignal": "SIGTERM",
        "Labels": {LABEL: spec.container_id},
        "HostConfig": _host_config(spec),
    }


def _host_config(spec: ContainerSpec) -> Json:
    policy = spec.policy
    binds = [
        {
            "Type": "bind",
            "Source": bind_source(mount, spec),
            "Target": mount.target,
            "BindOptions": {"Propagation": "private"},
        }
        # Read-only ones come from a mount that is read-only already: Docker's own "ReadOnly" is a remount that
        # forgets nosuid, nodev and noexec (runc 1.1 remounts with the flags it was given only).
        for mount in mounts.PLAN
        if mount.source in (Source.APP, Source.DISK, Source.FIXED)
    ]
    host: Json = {
        "Mounts": binds,
        "Tmpfs": {"/dev/shm": _shm(policy)},
        "ReadonlyRootfs": True,
        "NetworkMode": "none",  # we wire it ourselves, behind the gate
        "IpcMode": "private",
        "PidMode": "",
        "UTSMode": "",
        "CgroupnsMode": "private",
        "CgroupParent": spec.cgroup,
        "CapAdd": [],
        "CapDrop": ["ALL"],
        "SecurityOpt": [
            *("no-new-privileges", "seccomp=" + json.dumps(seccomp.document())),
            *((f"apparmor={spec.label}",) if spec.label else ()),
        ],
        "Privileged": False,
        "PublishAllPorts": False,
        "AutoRemove": False,
        "Init": False,
        "RestartPolicy": {"Name": "no"},
        "OomScoreAdj": policy.oom_score,
        # Docker 20.10 lets everybody bind port 80 and ping; elsewhere these are the kernel's defaults.
        "Sysctls": {"net.ipv4.ip_unprivileged_port_start": "1024", "net.ipv4.ping_group_range": "1 0"},
        "MaskedPaths": list(mounts.MASKED),
        "ReadonlyPaths": list(mounts.READ_ONLY),
        "Ulimits": [{"Name": limit.name.lower(), "Soft": limit.soft, "Hard": limit.hard} for limit in policy.rlimits],
        "LogConfig": {"Type": "none", "Config": {}},
    }
    if policy.holds(Clause.MEMORY):
        host |= {"Memory": policy.memory_max_bytes, "MemoryReservation": policy.memory_quota_bytes}
        if policy.holds(Clause.SWAP):
            host["MemorySwap"] = policy.memory_swap_max_bytes
    if policy.holds(Clause.PIDS):
        host["PidsLimit"] = policy.pids_max
    if policy.holds(Clause.CPU):
        host["CpuShares"] = policy.cpu_shares
        if policy.cpu_quota_us:
            host |= {"CpuPeriod": CPU_PERIOD_US, "CpuQuota": policy.cpu_quota_us}
    return host


def _shm(policy: Policy) -> str:
    return f"rw,nosuid,nodev,noexec,size={policy.shm_bytes},nr_inodes={policy.shm_inodes},mode=1777"
