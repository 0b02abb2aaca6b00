"""``python -m tests.vm build|run|shell|parity [GUEST [KERNEL WORDS]]``: an image, its tests, a login, the table.

The kernel word ``sandbox.only=STEP,STEP`` runs some steps of a guest only.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.conftest import default_state
from tests.vm import image, machine, parity, payload


def say(line: str) -> None:
    print(f"-----> {line}", flush=True)


def main(verb: str, name: str = "debian-13", append: str = "") -> int:
    if verb == "parity":
        results = default_state() / "vm" / "results"
        parity.DOCUMENT.write_text(
            parity.render({name: path for name in image.guests() if (path := results / name / "results").exists()})
        )
        say(f"wrote {parity.DOCUMENT}")
        return 0
    try:
        if name not in image.guests():
            raise image.ImageError(f"there is no guest {name!r}: {', '.join(image.guests())}")
        made = image.ensure(name, say)
        if verb == "build":
            return 0
        with tempfile.TemporaryDirectory(prefix="sbvm-", dir="/var/tmp") as text:
            folder = Path(text)
            accel = machine.accelerator(made.kernel, made.initrd, say)
            disk = payload.make(folder, made.python)
            if verb == "shell":
                say("Ctrl-A X ends it; the working tree is in /payload/source, and nothing is kept")
                return subprocess.call(machine.argv(made, disk, accel, None, append))
            with machine.Machine(made, disk, folder, accel, say, append) as guest:
                verdict = guest.wait(3600)
                kept = default_state() / "vm" / "results" / name / "results"
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(verdict.results, kept)
                say(f"{'passed' if verdict.passed else 'FAILED'} after {verdict.seconds:.0f} s")
                return int(not verdict.passed)
    except (image.ImageError, machine.MachineError) as error:
        print(f"sandbox vm: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
