"""Reports of the same policy on every engine and runtime of this guest: of an attacked twin; of gVisor a live dyno.

``parity.py FOLDER``: writes FOLDER/ENGINE-RUNTIME.twin.json, oci-runsc.live.json; 1 when a check of a twin failed or broke.
gVisor's dyno is started with every clause waived that the host cannot read of it; its twin is not attacked.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

PLACES = (("oci", "runc"), ("oci", "crun"), ("docker", "runc"), ("oci", "runsc"))
SANDBOX, APP = ".venv/bin/sandbox", "examples/shell"


def main(folder: Path) -> int:
    from sandbox.config import load
    from sandbox.supervisor import engines

    folder.mkdir(exist_ok=True)
    bad = 0
    for engine, runtime in PLACES:
        words = ["--engine", engine, *(["--runtime", runtime] if engine == "oci" else [])]
        missing = engines.make(load(), engine, runtime).missing()
        waive = [word for clause in missing for word in ("--waive", clause.value)]
        name = folder / f"{engine}-{runtime}"
        if runtime == "runsc":
            live(words + waive, Path(f"{name}.live.json"))
        else:
            bad += twin(words + waive, Path(f"{name}.twin.json"))
    return int(bad > 0)


def live(words: list[str], path: Path) -> None:
    known = set(Path("/run/sandbox/dynos").glob("*/record.json"))
    dyno = subprocess.Popen(
        [SANDBOX, "run", "-q", "--raw", *words, APP, "--", "sleep", "600"], stdin=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 240
        while not (new := set(Path("/run/sandbox/dynos").glob("*/record.json")) - known):
            if dyno.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"no dyno: {words}")
            time.sleep(0.2)
        with path.open("wb") as file:
            subprocess.run(
                [SANDBOX, "report", "-q", "--format", "json", new.pop().parent.name], stdout=file, check=False
            )
        print(path.name, json.loads(path.read_text())["summary"]["counts"], flush=True)
    finally:
        dyno.terminate()
        dyno.wait(240)


def twin(words: list[str], path: Path) -> int:
    with path.open("wb") as file:
        subprocess.run([SANDBOX, "report", "-q", "--format", "json", *words, APP], stdout=file, check=False)
    if not path.stat().st_size:
        return 1
    document = json.loads(path.read_text())
    bad = [check for check in document["checks"] if check["status"] in ("fail", "error")]
    print(path.name, document["summary"]["counts"], f"{document['seconds']} s", flush=True)
    for check in bad:
        print(json.dumps(check, indent=1), flush=True)
    return len(bad)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
