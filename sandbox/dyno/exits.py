"""Why a dyno ended, decided in one place: for the exit code, the message, the log lines and the JSON."""

from __future__ import annotations

import signal
from enum import Enum
from typing import NamedTuple

from sandbox.policy.policy import Policy
from sandbox.units import MIB, escape

TIMED_OUT, NOT_STARTED = 124, 125


class Reason(Enum):
    EXITED = "exited"
    SIGNAL = "signal"
    OOM = "oom"
    TIMEOUT = "timeout"
    STOPPED = "stopped"
    EXIT_TIMEOUT = "exit-timeout"
    BOOT_TIMEOUT = "boot-timeout"
    OUTPUT_CLOSED = "output-closed"
    SHIM_LOST = "shim-lost"
    NO_ANSWER = "no-answer"


class Facts(NamedTuple):
    """What was seen. ``status``: of the dyno's init, 128 + N after signal N, None when nobody knows it."""

    status: int | None
    oom: bool = False
    oom_task: str = ""
    timed_out_s: float | None = None
    boot_timeout_s: float | None = None
    stopped: bool = False
    output_closed: bool = False
    killed_after_grace_s: float | None = None


class Exit(NamedTuple):
    """``code``: what our command exits with. ``message``: one sentence with the number and the limit."""

    code: int
    reason: Reason
    message: str


def describe(facts: Facts, policy: Policy) -> Exit:
    """The end of a dyno. Causes of ours come before the status that they led to; an unknown status is never 0."""
    status = facts.status
    late = ""
    if facts.killed_after_grace_s is not None:
        late = f", and by SIGKILL since it was still alive {facts.killed_after_grace_s:g} s after SIGTERM (R12)"
    if facts.oom:
        largest = f" (killed by the kernel: {escape(facts.oom_task)})" if facts.oom_task else ""
        limit = policy.memory_kill_bytes // MIB
        quota = policy.memory_quota_bytes // MIB
        return Exit(
            137,
            Reason.OOM,
            f"Error R15 (Memory quota vastly exceeded): it reached {limit} MiB, its quota is {quota} MiB; "
            f"all its processes were ended by SIGKILL{largest}",
        )
    if facts.boot_timeout_s is not None:
        return Exit(
            137,
            Reason.BOOT_TIMEOUT,
            f"Error R10 (Boot timeout): nothing listened on $PORT within {facts.boot_timeout_s:g} s; SIGKILL",
        )
    if facts.timed_out_s is not None:
        return Exit(TIMED_OUT, Reason.TIMEOUT, f"ended by our timeout of {facts.timed_out_s:g} s with SIGTERM{late}")
    if status is None:
        return Exit(
            NOT_STARTED,
            Reason.SHIM_LOST,
            "its exit status is unknown: the engine's process that held it was lost; "
            "all its processes were ended by SIGKILL",
        )
    if facts.killed_after_grace_s is not None:
        return Exit(status, Reason.EXIT_TIMEOUT, f"stopped with SIGTERM{late}")
    if facts.output_closed:
        return Exit(
            status,
            Reason.OUTPUT_CLOSED,
            f"stopped with SIGTERM because nobody reads its output any more; status {status}",
        )
    if facts.stopped:
        return Exit(status, Reason.STOPPED, f"stopped with SIGTERM; exited with status {status}")
    if status > 128 and status - 128 in {s.value for s in signal.Signals}:
        name = signal.Signals(status - 128).name
        return Exit(status, Reason.SIGNAL, f"ended by signal {name}; exited with status {status}")
    words = {126: " (the command is not executable)", 127: " (the command was not found)"}.get(status, "")
    return Exit(status, Reason.EXITED, f"exited with status {status}{words}")
