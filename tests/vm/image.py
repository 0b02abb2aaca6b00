"""Guest images: built by mmdebstrap from images/vm, cached under the digest of that recipe, hashed before use."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from sandbox.host import stack
from tests.conftest import ROOT, default_state

RECIPE = ROOT / "images" / "vm"
_SIZE = "12G"  # sparse: what is not written takes no room
Say = Callable[[str], None]


class ImageError(Exception):
    """A guest's image cannot be made or used: what is wrong, and what to do."""


class Image(NamedTuple):
    """``root``: an ext4 file system, never written to; ``kernel``, ``initrd``: taken out of it."""

    guest: str
    python: str
    root: Path
    kernel: Path
    initrd: Path


def guests() -> dict[str, dict]:
    """The recipe of each guest, with what all have in common."""
    table = tomllib.loads((RECIPE / "guests.toml").read_text())
    common = table.pop("all")["packages"]
    return {name: {**guest, "packages": [*common, *guest["packages"]]} for name, guest in table.items()}


def ensure(name: str, say: Say, cache: Path | None = None) -> Image:
    """The image of that guest: from the cache if it is what was built there, built anew otherwise. ImageError."""
    guest = guests()[name]
    inputs = [
        json.dumps(guest, sort_keys=True),
        _SIZE,
        *((RECIPE / f).read_text() for f in ("root-setup", "root-finish")),
    ]
    digest = hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:16]
    cache = cache or default_state() / "vm"
    folder = cache / f"{name}-{digest}"
    image = Image(name, guest["python"], folder / "root.img", folder / "vmlinuz", folder / "initrd.img")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if reason := unusable(image):
                say(f"{name}: {reason}")
                _build(guest, image, say)
                for old in cache.glob(f"{name}-*"):
                    if old != folder:
                        shutil.rmtree(old)
    except OSError as error:
        raise ImageError(f"{name}: its image cannot be kept in {cache}: {error.strerror}; `df` says more.") from error
    return image


def unusable(image: Image) -> str:
    """Why the cached image is not used; empty when it is. A file is hashed when it is not the one hashed before."""
    try:
        known = json.loads((image.root.parent / "seal.json").read_text())
        for path in (image.root, image.kernel, image.initrd):
            identity, digest = known[path.name]
            if stack.identity(str(path)) != identity and _digest(path) != digest:
                return f"{path.name} in the cache was altered: the image is built anew"
    except FileNotFoundError:
        return "no image of this recipe is built yet"
    except (ValueError, KeyError):
        return "the cache is damaged: the image is built anew"
    return ""


def seal(image: Image) -> None:
    """Writes down what the files are, for the next time."""
    files = (image.root, image.kernel, image.initrd)
    known = {path.name: [stack.identity(str(path)), _digest(path)] for path in files}
    (image.root.parent / "seal.json").write_text(json.dumps(known))


def _digest(path: Path) -> str:
    """SHA-256 over what is written of a sparse file, and where."""
    found, at, size = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while at < size:
            try:
                begin = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:  # ENXIO: only a hole is left
                break
            at = os.lseek(file.fileno(), begin, os.SEEK_HOLE)
            found.update(f"{begin}-{at}".encode())
            for offset in range(begin, at, 1 << 22):
                found.update(os.pread(file.fileno(), min(1 << 22, at - offset), offset))
    return found.hexdigest()


def _build(guest: dict, image: Image, say: Say) -> None:
    shutil.rmtree(image.root.parent, ignore_errors=True)
    work = image.root.parent.with_suffix(".new")
    shutil.rmtree(work, ignore_errors=True)
    try:
        tree = work / "tree"
        work.mkdir(mode=0o700)
        packages = guest["packages"] + [
            f"{package}/{guest['suite']}-backports" for package in guest.get("backports", [])
        ]
        with _progress(f"{image.guest}: installing {len(packages)} packages and what they need", say):
            _run(
                "mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", "--format=directory",
                "--dpkgopt=force-unsafe-io", '--aptopt=Acquire::Languages "none"', "--aptopt=Acquire::Retries 3",
                "--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-include=/usr/share/doc/*/copyright",
                "--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/locale/*",
                f'--setup-hook={RECIPE}/root-setup "$1"', f'--customize-hook={RECIPE}/root-finish "$1"',
                f"--include={','.join(packages)}", guest["suite"], str(tree),
                env={"SUITE": guest["suite"], "BACKPORTS": " ".join(guest.get("backports", [])), "TMPDIR": str(work)},
            )  # fmt: skip
        with _progress(f"{image.guest}: packing its disk", say):
            for path, pattern in ((image.kernel, "vmlinuz-*"), (image.initrd, "initrd.img-*")):
                shutil.copyfile(next((tree / "boot").glob(pattern)), work / path.name)
            _run("mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(work / image.root.name), _SIZE)
        shutil.rmtree(tree)
        seal(image._replace(root=work / "root.img", kernel=work / "vmlinuz", initrd=work / "initrd.img"))
        work.rename(image.root.parent)
    except StopIteration as error:
        raise ImageError(f"{image.guest}: no kernel image came with its packages (images/vm/guests.toml).") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _run(*argv: str, env: dict[str, str] | None = None) -> None:
    path = f"/usr/sbin:/usr/bin:/sbin:/bin:{os.environ.get('PATH', '')}"
    done = subprocess.run(
        argv, capture_output=True, text=True, env={**os.environ, "PATH": path, **(env or {})}, check=False
    )
    if done.returncode:
        raise ImageError(f"{argv[0]} failed ({done.returncode}): {done.stderr.strip()[-1500:]}")


@contextmanager
def _progress(what: str, say: Say) -> Iterator[None]:
    """A line at the start, and one every 15 seconds."""
    begin, done = time.monotonic(), threading.Event()

    def tick() -> None:
        while not done.wait(15):
            say(f"{what} ({time.monotonic() - begin:.0f} s)")

    say(what)
    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
