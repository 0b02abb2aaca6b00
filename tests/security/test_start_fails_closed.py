"""If one clause of the policy is not enforced, the start is refused, the clause is named, and nothing is left.

Each case takes one clause out of what the engine is asked for; the verification must see it in the kernel. The app
would write a mark as its first act: no mark, no instruction of it ran.
"""

from __future__ import annotations

import pytest

from tests.conftest import EXAMPLES, census

CASES = {
    "no-seccomp": "seccomp",
    "no-nnp": "no-new-privileges",
    "cap-net-raw": "capabilities",
    "uid-0": "uid",
    "host-pid": "namespaces",
    "host-ipc": "namespaces",
    "host-uts": "namespaces",
    "host-net": "namespaces",
    "extra-bind": "mounts",
    "no-mask": "mounts",
    "big-shm": "mounts",
    "more-memory": "memory",
    "more-pids": "pids",
    "more-cpu": "cpu",
    "no-rlimits": "rlimits",
    "no-oom-score": "oom-score",
    "no-quota": "disk",
}


def run(sandbox, engine, mutant, *options):
    return sandbox(
        "run", "--raw", "--engine", engine, *options, str(EXAMPLES / "shell"), "--", "sh", "-c", "echo APP RAN; echo APP RAN >&2",
        mutant=mutant,
    )  # fmt: skip


@pytest.mark.parametrize("mutant", CASES)
def test_a_missing_clause_refuses_the_start(sandbox, engine, mutant):
    done = run(sandbox, engine, mutant)
    assert done.status == 125, done
    if (engine, mutant) == ("oci", "host-pid"):
        # The kernel itself refuses: a process without rights over the pid namespace cannot mount its /proc.
        assert 'at "/proc"' in done.err
    else:
        assert "not started" in done.err
        assert f"{CASES[mutant]}: promised" in done.err
    assert "APP RAN" not in done.out + done.err
    assert census(sandbox) == []


def test_control_with_every_clause_in_place_it_starts(sandbox, engine):
    done = run(sandbox, engine, "none")
    assert done.status == 0
    assert "APP RAN" in done.out


def test_an_open_device_list_refuses_the_start(sandbox):
    """Only the embedded engine: Docker offers no way to open the list short of --privileged."""
    done = run(sandbox, "oci", "all-devices")
    assert done.status == 125
    assert "devices: promised" in done.err


@pytest.mark.parametrize("mutant", ["no-seccomp", "more-pids"])
def test_a_waiver_by_name_starts_it_and_is_reported(sandbox, engine, mutant):
    clause = CASES[mutant]
    done = sandbox(
        "run", "--json", "--engine", engine, "--waive", clause, str(EXAMPLES / "shell"), "--", "true",
        mutant=mutant if clause == "seccomp" else "none",
    )  # fmt: skip
    assert done.status == 0, done
    assert done.json()["waived"] == [clause]


def test_a_waiver_of_another_clause_does_not_help(sandbox, engine):
    assert run(sandbox, engine, "no-seccomp", "--waive", "cpu").status == 125


def test_an_engine_that_cannot_keep_a_promise_is_refused_before_the_start(sandbox):
    """Crun 1.8 cannot use v1 hierarchies; runsc's wall is not readable from the host."""
    done = sandbox("run", "--engine", "docker", str(EXAMPLES / "shell"), "--", "true", mutant="docker-lacks-pids")
    assert done.status == 125
    assert "cannot enforce the policy here: pids" in done.err
    assert "--waive pids" in done.err
    assert census(sandbox) == []
