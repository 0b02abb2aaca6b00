"""The read-only disk of a guest: the working tree, the wheels that its set-up installs, the stack images."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tests.conftest import ROOT, default_state

# What runs pytest in a guest; no linter.
_TESTING = ("iniconfig", "packaging", "pluggy", "pygments", "pytest", "pytest-timeout")


def make(folder: Path, python: str) -> Path:
    """The disk for a guest with that Python, in ``folder``."""
    tree = folder / "payload"
    source = tree / "source"
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listing.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    shutil.copytree(_wheels(python), tree / "wheels")
    for wheel in _wheels(python, testing=True).iterdir():
        zipfile.ZipFile(wheel).extractall(tree / "testing")
    _stack(tree / "stack")
    disk = folder / "payload.squashfs"
    pack = ["mksquashfs", str(tree), str(disk), "-quiet", "-no-progress", "-noI", "-noD", "-noF", "-noX", "-all-root"]
    subprocess.run(pack, check=True, capture_output=True)
    shutil.rmtree(tree)
    return disk


def _stack(into: Path) -> None:
    """The stack images of this host, as they will lie in the guest's own state folder."""
    into.mkdir()
    for index in (default_state() / "stack").glob("*.json"):
        entry = json.loads(index.read_text())
        if not isinstance(entry, dict) or "image" not in entry:
            continue
        for key in ("image", "manifest"):
            path = Path(entry[key])
            (into / path.name).hardlink_to(path) if path.stat().st_dev == into.stat().st_dev else shutil.copy2(
                path, into
            )
            entry[key] = f"/var/lib/sandbox/stack/{path.name}"
        (into / index.name).write_text(json.dumps(entry))


def _testing() -> str:
    """The blocks of requirements/dev.txt that pytest needs: one starts where a line is not indented."""
    wanted, kept = False, []
    for line in (ROOT / "requirements" / "dev.txt").read_text().splitlines():
        if not line.startswith(" "):
            wanted = line.partition("==")[0] in _TESTING
        if wanted:
            kept.append(line)
    return "\n".join(kept) + "\n"


def _wheels(python: str, *, testing: bool = False) -> Path:
    """The wheels that `make setup` asks for under that Python, or pytest's: downloaded once, checked by their hashes."""
    wanted = _testing() if testing else (ROOT / "requirements" / "run.txt").read_text()
    digest = hashlib.sha256(wanted.encode()).hexdigest()[:16]
    folder = default_state() / "vm" / "wheels" / f"{python}-{digest}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix="new-", dir=folder.parent))
        (draft / "wanted").write_text(wanted)
        platforms = [f"--platform=manylinux{name}_x86_64" for name in ("_2_34", "_2_28", "_2_17", "2014")]
        subprocess.run(
            [
                sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps", "--require-hashes",
                "--only-binary=:all:", f"--python-version={python}", *platforms, "-d", str(draft), "-r", str(draft / "wanted"),
            ],
            check=True,
        )  # fmt: skip
        (draft / "wanted").unlink()
        draft.rename(folder)
    return folder
