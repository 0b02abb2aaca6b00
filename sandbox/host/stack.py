"""The stack image: built from the host's own package mirror, content-addressed, checked before it is used."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from enum import Enum
from typing import NamedTuple

from sandbox import hostcmd
from sandbox.config import Config
from sandbox.errors import HostError, StackError

Progress = Callable[[str], None]

# Folders that a dyno mounts over, and files that it binds over. They must exist in a read-only root.
_MOUNT_POINTS = ("app", "dev", "proc", "sys", "run/gate", "tmp", "var/tmp", "var/log", "etc/heroku")
_BIND_FILES = ("etc/hosts", "etc/hostname", "etc/resolv.conf")
_EMPTIED = ("var/lib/apt/lists", "var/cache", "var/log", "run", "tmp", "var/tmp", "dev", "proc", "sys", "root", "home")
_REMOVED = ("etc/machine-id", "var/lib/dbus/machine-id", "var/lib/dpkg/status-old", "var/lib/dpkg/diversions-old")


class Variant(Enum):
    RUNTIME = "runtime"
    BUILD = "build"


class Stack(NamedTuple):
    """A stack image that was checked. ``digest``: sha256 of the squashfs file at ``image``."""

    variant: Variant
    digest: str
    image: str
    manifest: str
    indexes: tuple[tuple[str, str], ...] = ()  # of the build variant: kind of app, addresses of its package indexes


def recipe_dir() -> str:
    """Where the recipe is: in the source tree, or packed into the installed package."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for path in (f"{package}/_images/stack", f"{os.path.dirname(package)}/images/stack"):
        if os.path.isdir(path):
            return path
    raise StackError("the stack image's recipe (images/stack) is missing from this installation.")


def recipe_digest(variant: Variant) -> str:
    """The digest of all inputs that are ours: a change of the recipe asks for a new image."""
    digest = hashlib.sha256()
    for name in ("suite", "epoch", "exclude", "profile", "runtime.packages", "build.packages", "indexes"):
        if name in ("build.packages", "indexes") and variant is Variant.RUNTIME:
            continue
        digest.update(_recipe(name).encode() + b"\0")
    return digest.hexdigest()


def find(config: Config, variant: Variant) -> Stack:
    """The built image, after a check that nobody altered it.

    The whole file is hashed when its identity (inode, size, times) is not the one that was hashed before.
    Raises StackError when it is missing or does not match.
    """
    index = _index(config, variant)
    try:
        with open(index, encoding="utf-8") as file:
            entry = json.load(file)
        indexes = tuple((str(kind), str(urls)) for kind, urls in entry.get("indexes", []))
        stack = Stack(variant, entry["digest"], entry["image"], entry["manifest"], indexes)
        seen = entry["stat"]
    except FileNotFoundError as error:
        raise StackError(f"the {variant.value} stack image is not built yet.", hint="sandbox stack build") from error
    except (ValueError, KeyError) as error:
        raise StackError(f"{index} is damaged.", hint="sandbox stack build") from error
    try:
        now = identity(stack.image)
    except FileNotFoundError as error:
        raise StackError(f"the stack image {stack.image} is missing.", hint="sandbox stack build") from error
    if now != seen:
        actual = file_digest(stack.image)
        if actual != stack.digest:
            raise StackError(
                f"the stack image {stack.image} was altered: expected SHA256:{stack.digest}, actual SHA256:{actual}. "
                "Nothing was started.",
                hint="sandbox stack build --force makes it anew; find out who wrote to it.",
            )
        _write_index(config, stack, entry["recipe"])
    return stack


def is_current(config: Config, variant: Variant) -> bool:
    """Whether an image of today's recipe is built (its content is checked at use)."""
    try:
        with open(_index(config, variant), encoding="utf-8") as file:
            entry = json.load(file)
    except (FileNotFoundError, ValueError):
        return False
    return bool(entry.get("recipe") == recipe_digest(variant) and os.path.exists(str(entry.get("image"))))


def build(config: Config, variant: Variant, *, progress: Progress) -> Stack:
    """Builds the image from the recipe and the host's package mirror; about a minute."""
    import shutil

    mmdebstrap = hostcmd.require("mmdebstrap", "mmdebstrap")
    mksquashfs = hostcmd.require("mksquashfs", "squashfs-tools")
    packages = _packages("runtime.packages")
    if variant is Variant.BUILD:
        packages += _packages("build.packages")
    epoch = int(_recipe("epoch"))
    work = f"{config.stack_dir}/work-{variant.value}-{os.getpid()}"
    root = f"{work}/root"
    os.makedirs(work, mode=0o700)
    environment = {**hostcmd.ENVIRONMENT, **_passed_on(), "SOURCE_DATE_EPOCH": str(epoch), "TMPDIR": work}
    try:
        progress(f"{variant.value} stack: installing {len(packages)} packages and what they need")
        excludes = [f"--dpkgopt=path-exclude={line}" for line in _lines("exclude")]
        # Copyright files stay: the licences ask for it.
        excludes.append("--dpkgopt=path-include=/usr/share/doc/*/copyright")
        hostcmd.run(
            [
                mmdebstrap,
                *("--quiet", "--mode=root", "--variant=minbase", "--format=directory", "--dpkgopt=force-unsafe-io"),
                *('--aptopt=Acquire::Languages "none"', "--aptopt=Acquire::Retries 3"),
                *excludes,
                f"--include={','.join(packages)}",
                _recipe("suite").strip(),
                root,
            ],
            timeout_s=1800,
            env=environment,
        )
        indexes = _indexes(root) if variant is Variant.BUILD else ()
        progress(f"{variant.value} stack: cleaning, and hashing every file")
        _clean(root)
        _normalise(root, epoch)
        manifest = json.dumps(_manifest(root), sort_keys=True, separators=(",", ":")).encode()
        progress(f"{variant.value} stack: packing")
        draft = f"{work}/image"
        hostcmd.run(
            [
                mksquashfs,
                root,
                draft,
                "-noappend",
                "-no-xattrs",
                "-no-progress",
                "-quiet",
                "-comp",
                "zstd",
                "-Xcompression-level",
                "6",
            ],
            timeout_s=900,
            env=environment,
        )
        digest = file_digest(draft)
        stack = Stack(
            variant,
            digest,
            f"{config.stack_dir}/{digest}.squashfs",
            f"{config.stack_dir}/{digest}.manifest.json",
            indexes,
        )
        with open(f"{work}/manifest", "wb") as file:
            file.write(manifest)
        os.chmod(draft, 0o400)
        os.rename(f"{work}/manifest", stack.manifest)
        os.rename(draft, stack.image)
        _write_index(config, stack, recipe_digest(variant))
    except HostError as error:
        raise StackError(
            f"the {variant.value} stack image could not be built: {error.message}",
            hint=error.hint or "`apt-get update` must work on this host; `-v` shows more.",
            details=error.details,
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return stack


def file_digest(path: str) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tar_stream(root: str) -> Iterator[bytes]:
    """The tree as a tar stream, sorted, for an engine that imports images; owners and times as they are."""
    tar = hostcmd.require("tar", "tar")
    return hostcmd.stream([tar, "-C", root, "--format=gnu", "--sort=name", "--numeric-owner", "-cf", "-", "."])


def _recipe(name: str) -> str:
    with open(f"{recipe_dir()}/{name}", encoding="utf-8") as file:
        return file.read()


def _lines(name: str) -> list[str]:
    return [line for line in _recipe(name).split("\n") if line and not line.startswith("#")]


def _packages(name: str) -> list[str]:
    return [line.strip() for line in _lines(name)]


def _passed_on() -> dict[str, str]:
    """A proxy, if the operator's environment has one: apt reads it from there."""
    names = ("http_proxy", "https_proxy", "no_proxy")
    return {name: os.environ[name] for name in names if name in os.environ}


def _index(config: Config, variant: Variant) -> str:
    return f"{config.stack_dir}/{variant.value}.json"


def identity(path: str) -> list[int]:
    """What changes when somebody writes to a file or replaces it: a new hash is due when it differs."""
    status = os.stat(path)
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _write_index(config: Config, stack: Stack, recipe: str) -> None:
    entry = {
        "digest": stack.digest,
        "image": stack.image,
        "manifest": stack.manifest,
        "recipe": recipe,
        "indexes": stack.indexes,
        "stat": identity(stack.image),
    }
    draft = f"{_index(config, stack.variant)}.{os.getpid()}"
    with open(draft, "w", encoding="utf-8") as file:
        json.dump(entry, file)
    os.rename(draft, _index(config, stack.variant))


def _indexes(root: str) -> tuple[tuple[str, str], ...]:
    """What the build tools say of themselves, in the image that was just made from signed packages."""
    chroot = hostcmd.require("chroot", "coreutils")
    found = []
    for line in _lines("indexes"):
        kind, _, command = line.partition(" ")
        said = hostcmd.run([chroot, root, "/bin/sh", "-c", command]).stdout.decode("utf-8", "replace")
        found.append((kind, " ".join(said.split())))
    return tuple(found)


def _clean(root: str) -> None:
    import shutil

    for name in _EMPTIED:
        shutil.rmtree(f"{root}/{name}", ignore_errors=True)
        os.makedirs(f"{root}/{name}", mode=0o755)
    for name in _REMOVED:
        if os.path.lexists(f"{root}/{name}"):
            os.unlink(f"{root}/{name}")
    for name in _MOUNT_POINTS:
        os.makedirs(f"{root}/{name}", mode=0o755, exist_ok=True)
    for name in _BIND_FILES:
        if os.path.lexists(f"{root}/{name}"):
            os.unlink(f"{root}/{name}")
        with open(f"{root}/{name}", "w", encoding="ascii"):
            pass
    with open(f"{root}/etc/profile", "w", encoding="utf-8") as file:
        file.write(_recipe("profile"))
    # Docker replaces /etc/mtab by this very link; made here, both engines show the same.
    if os.path.lexists(f"{root}/etc/mtab"):
        os.unlink(f"{root}/etc/mtab")
    os.symlink("/proc/mounts", f"{root}/etc/mtab")


def _normalise(root: str, epoch: int) -> None:
    """No setuid, setgid or capability anywhere, no file newer than the epoch, no device left."""
    for path, folders, names in os.walk(root, topdown=False):
        for name in (*names, *folders):
            full = f"{path}/{name}"
            status = os.lstat(full)
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode) or stat.S_ISLNK(status.st_mode)):
                os.unlink(full)
                continue
            if not stat.S_ISLNK(status.st_mode):
                if status.st_mode & 0o6000:
                    os.chmod(full, stat.S_IMODE(status.st_mode) & ~0o6000)
                for attribute in os.listxattr(full, follow_symlinks=False):
                    os.removexattr(full, attribute, follow_symlinks=False)
            time = min(int(status.st_mtime), epoch)
            os.utime(full, (time, time), follow_symlinks=False)
    os.utime(root, (epoch, epoch))


def _manifest(root: str) -> dict[str, dict[str, str | int]]:
    entries: dict[str, dict[str, str | int]] = {}
    for path, folders, names in os.walk(root):
        for name in (*folders, *names):
            full = f"{path}/{name}"
            status = os.lstat(full)
            entry: dict[str, str | int] = {
                "mode": stat.S_IMODE(status.st_mode),
                "uid": status.st_uid,
                "gid": status.st_gid,
            }
            if stat.S_ISLNK(status.st_mode):
                entry["link"] = os.readlink(full)
            elif stat.S_ISREG(status.st_mode):
                entry |= {"size": status.st_size, "sha256": file_digest(full)}
            entries[os.path.relpath(full, root)] = entry
    return entries
