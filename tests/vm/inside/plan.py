"""The steps of a guest, in their order. Read by the guest's own Python, before anything is installed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

PAYLOAD, SOURCE, RESULTS = Path("/payload"), Path("/root/sandbox"), Path("/var/tmp/results")
ENVIRONMENT = {
    **os.environ,
    "HOME": "/root",
    "LC_ALL": "C.UTF-8",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    # The guest has no network: what pip would fetch is on the disk, by the same hashes.
    "PIP_NO_INDEX": "1",
    "PIP_FIND_LINKS": str(PAYLOAD / "wheels"),
}


class Step(NamedTuple):
    """``command``: in the working tree; ``always``: needed by the others; ``resets``: ends with a hard reset."""

    name: str
    command: str
    seconds: int = 600
    always: bool = False
    resets: bool = False

    def run(self, tell: Callable[[str], None]) -> bool:
        RESULTS.mkdir(exist_ok=True)
        environment = {**ENVIRONMENT, "RESULTS": str(RESULTS), "STEP": self.name}
        with (RESULTS / f"{self.name}.log").open("wb") as log:
            try:
                done = subprocess.run(
                    ["/bin/bash", "-euo", "pipefail", "-c", self.command],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment,
                    cwd=SOURCE if SOURCE.exists() else "/", timeout=self.seconds, check=False,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                log.write(f"\nended after {self.seconds} s\n".encode())
                return False
        return done.returncode == 0


_PYTEST = ".venv/bin/python -m pytest -q -p tests.vm.inside.progress --timeout=900 --junitxml=$RESULTS/$STEP.xml"
# What differs between kernels, cgroup versions and runtimes, by the files that prove it here.
_CORE = (
    "test_a_memory_bomb_dies_at_the_kill_limit or test_forks_end_at_the_limit or test_foreign_abis_are_killed"
    " or test_it_runs_as_an_unprivileged_id or test_bytes_end_in_enospc or test_only_its_own_folders_are_writable"
)
# By name: what the other files import (schemas) is not installed here.
_FILES = " ".join(
    f"tests/security/test_{name}.py" for name in ("memory", "pids", "syscalls", "identity", "disk", "files")
)
_SECURITY = f"{_PYTEST} {_FILES} -k '{_CORE}'"
# One dyno first: Docker imports the stack image.
_DOCKER = f".venv/bin/sandbox run -q --engine docker --egress none examples/shell -- true; SANDBOX_TEST_DOCKER=unix:///run/docker.sock {_SECURITY}"
# A host has a way out; the guest gets one that ends in itself.
_ROUTE = "ip link del way0 2>/dev/null || true; ip link add way0 type dummy; ip address add 192.0.2.2/24 dev way0; ip link set way0 up; ip route add default via 192.0.2.1"
_NO_ROUTE = "ip link del way0 || true"

STEPS = (
    Step(
        "copy",
        "cp -a /payload/source /root/sandbox; install -d -m 711 /var/lib/sandbox; cp -a /payload/stack /var/lib/sandbox/stack",
        always=True,
    ),
    Step("setup", "make setup", seconds=900, always=True),
    # Unpacked on the host: pip takes an emulated processor most of a minute for it.
    Step(
        "pytest",
        "cp -a /payload/testing /root/; for site in .venv/lib/python3*/site-packages; do echo /root/testing > $site/testing.pth; done",
        always=True,
    ),
    Step(
        "readme",
        f"{_ROUTE}; .venv/bin/sandbox run examples/shell -- sh report.sh; .venv/bin/sandbox doctor | tee $RESULTS/doctor.txt; .venv/bin/sandbox gc; {_NO_ROUTE}",
    ),
    Step("host", f"{_PYTEST} tests/vm/inside/test_host.py", seconds=1200),
    Step("docker", f"SANDBOX_TEST_ENGINES=docker {_DOCKER}", seconds=900),
    Step("runc", f"SANDBOX_TEST_ENGINES=oci SANDBOX_RUNTIME=runc {_SECURITY}", seconds=900),
    Step("crun", f"SANDBOX_TEST_ENGINES=oci SANDBOX_RUNTIME=crun {_SECURITY}", seconds=900),
    Step(
        "parity",
        f"{_NO_ROUTE}; {_ROUTE}; PYTHONPATH=. .venv/bin/python tests/vm/inside/parity.py $RESULTS/parity; .venv/bin/sandbox firewall remove; {_NO_ROUTE}",
        seconds=1200,
    ),
    # A dyno lives; then the plug is pulled.
    Step(
        "reset",
        f"{_ROUTE}; .venv/bin/sandbox run -q examples/shell -- sleep 600 & sleep 25; ls /run/sandbox/dynos; ls /var/lib/sandbox/disks; sync; echo reset > /dev/virtio-ports/sandbox.talk; sleep 120; exit 1",
        seconds=300,
        resets=True,
    ),
    Step(
        "after-reset",
        "ls -R /var/lib/sandbox/journal /var/lib/sandbox/disks; .venv/bin/sandbox gc; .venv/bin/sandbox gc | grep 'Nothing was left';"
        ' test -z "$(ls /var/lib/sandbox/journal)"; ! ls /var/lib/sandbox/disks | grep sbx-; ! mount | grep sandbox/dynos;'
        f" {_ROUTE}; .venv/bin/sandbox run examples/shell -- true; .venv/bin/sandbox firewall remove",
    ),
)
