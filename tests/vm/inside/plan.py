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


STEPS = (
    Step(
        "copy",
        "cp -a /payload/source /root/sandbox; mkdir -p /var/lib/sandbox; chmod 711 /var/lib/sandbox; cp -a /payload/stack /var/lib/sandbox/stack",
        always=True,
    ),
    Step("setup", "make setup", always=True),
    Step(
        "testing",
        ".venv/bin/pip install -q --disable-pip-version-check --require-hashes --no-deps -r /payload/testing.txt",
        always=True,
    ),
    Step("doctor", ".venv/bin/sandbox doctor || true"),
    Step(
        "hello",
        "time unshare -n sh -c 'ip link set lo up; ip link add d0 type dummy; ip addr add 192.0.2.2/24 dev d0; ip link set d0 up; ip route add default via 192.0.2.1; for i in 1 2 3; do time .venv/bin/sandbox run examples/shell -- id; done; time .venv/bin/sandbox report --engine oci --runtime runc examples/shell; .venv/bin/sandbox firewall remove'",
    ),
    Step(
        "some",
        ".venv/bin/python -m pytest -q tests/security/test_syscalls.py tests/security/test_memory.py --durations=0",
    ),
)
