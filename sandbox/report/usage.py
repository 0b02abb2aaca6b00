"""Limits, by use: each of a twin's limits is used until something stops it, and measured from outside."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from typing import Any

from sandbox.host.cgroup import Cgroup
from sandbox.report.twin import Twin

Json = dict[str, Any]
_FLOOD = 48 << 20


def limits(twin: Twin, *, only: tuple[str, ...] = ()) -> tuple[Json, Json]:
    """(the prober's answers, what was measured from outside). ``only``: some of the experiments."""
    answers: Json = {}
    measured: Json = {"controls": {}}
    for name, experiment in _LIMITS.items():
        if not only or name in only:
            experiment(twin, answers, measured)
    return answers, measured


def _memory(twin: Twin, answers: Json, measured: Json) -> None:
    most = twin.wanted.policy.memory_swap_max_bytes
    before = twin.cgroup.usage()
    said = twin.prober.ask("memory", memory={"most": most + most // 4 + (64 << 20)})
    after = twin.cgroup.usage()
    measured["memory"] = {
        "said": said["RES-01"][0][1],
        "peak": after.memory_peak_bytes,
        "oom_kills": after.oom_kills - before.oom_kills,
    }


def _processes(twin: Twin, answers: Json, measured: Json) -> None:
    most = twin.wanted.policy.pids_max + 64
    # A large size is exercised no further than this: forks beyond it would only take time.
    answers.update(twin.prober.ask("forks", "threads", forks={"most": most}, threads={"most": most}))


def _cpu(twin: Twin, answers: Json, measured: Json) -> None:
    workers = min(os.cpu_count() or 1, 4)
    for name, seconds, timers in (("cpu", 0.8, False), ("timers", 0.4, True)):
        before, begin = twin.cgroup.usage().cpu_us, time.monotonic()
        twin.prober.ask("burn", burn={"workers": workers, "seconds": seconds, "timers": timers})
        used = (twin.cgroup.usage().cpu_us - before) / 1e6 / (time.monotonic() - begin)
        measured[name] = {"cpus": used, "workers": workers}


def _disk(twin: Twin, answers: Json, measured: Json) -> None:
    most = twin.wanted.policy.disk_bytes
    said = twin.prober.ask("disk", disk={"folder": "/tmp", "most": most + (256 << 20), "row": "FS-17"})["FS-17"]
    measured["disk"] = {"said": said[0][1], "written": said[1][1]}


def _files(twin: Twin, answers: Json, measured: Json) -> None:
    most = int(twin.wanted.policy.disk_inodes * 1.1) + 2048
    answers.update(twin.prober.ask("reserve", "inodes", inodes={"folder": "/var/tmp", "most": most}))


def _shm(twin: Twin, answers: Json, measured: Json) -> None:
    most = twin.wanted.policy.shm_bytes
    said = twin.prober.ask("disk", disk={"folder": "/dev/shm", "most": most + (64 << 20), "row": "shm"})["shm"]
    measured["shm"] = {"said": said[0][1], "written": said[1][1]}
    _charge(twin, answers, measured, "RES-03", "shm_charge", {"what": "shm", "mib": min(32, most >> 21)})


def _pipes(twin: Twin, answers: Json, measured: Json) -> None:
    _charge(twin, answers, measured, "RES-04", "pipes", {"what": "pipes", "count": 400})


def _charge(twin: Twin, answers: Json, measured: Json, row: str, name: str, what: Json) -> None:
    """What the twin's cgroup is charged for something that is held; as a control, what ours is charged for it."""
    ours = Cgroup.of(os.getpid())
    before, own = twin.cgroup.usage().memory_bytes, ours.usage().memory_bytes
    said = twin.prober.ask("hold", hold=what)
    if row not in said:  # it broke in there: said in the report, and the row stays unproven
        answers["errors"] = [*answers.get("errors", []), *said.get("errors", [])]
        return
    held = int(said[row][0][1])
    measured[name] = {"held": held, "charged": twin.cgroup.usage().memory_bytes - before}
    if (charged := ours.usage().memory_bytes - own) < 0.9 * held:
        measured["controls"][row] = f"the same reading of another cgroup: {charged} bytes of {held}"
    twin.prober.ask("release")


def _handles(twin: Twin, answers: Json, measured: Json) -> None:
    most = {"most": 12_000}
    answers.update(
        twin.prober.ask(
            "descriptors",
            "terminals",
            "small",
            descriptors=most,
            terminals={"most": 96},
            small={"most": 2048},
        )
    )


def _locks(twin: Twin, answers: Json, measured: Json) -> None:
    """The twin holds a lock on a file of the stack; the host locks the same file of the same image."""
    path = "/usr/bin/env"
    twin.prober.ask("hold", hold={"what": "lock", "path": path})
    layer = twin.dyno.slot.stack_layer if twin.dyno.slot is not None else ""
    measured["lock"] = _lock(f"{layer}{path}")
    # The control: through the twin's own root it is the very file that is locked.
    if (own := _lock(f"/proc/{twin.pid}/root{path}")) != "at once":
        measured["controls"]["FS-25"] = f"through the twin's own root: {own}"
    twin.prober.ask("release")


def _lock(path: str) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "must wait"
    finally:
        os.close(fd)
    return "at once"


_LIMITS: dict[str, Callable[[Twin, Json, Json], None]] = {
    "memory": _memory,
    "processes": _processes,
    "cpu": _cpu,
    "disk": _disk,
    "shm": _shm,
    "pipes": _pipes,
    "handles": _handles,
    "locks": _locks,
    "files": _files,
}


def flood(twin: Twin, measured: Json) -> None:
    """Our own memory while the twin writes as fast as it can; as a control, with a reader that keeps everything."""
    read, grown = twin.prober.flood(_FLOOD, keep=False)
    measured["LOG-01"] = {"read": read, "grown": grown}
    read, grown = twin.prober.flood(_FLOOD, keep=True)
    if grown >= _FLOOD // 2:
        measured["controls"]["LOG-01"] = f"a reader that keeps everything grew by {grown >> 20} MiB"
