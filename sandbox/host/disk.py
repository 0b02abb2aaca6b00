"""A dyno's disk image, the layers below it, and the mounts that make its file system.

One sparse, preformatted ext4 image per dyno holds all it may write: bytes and inodes both end in ENOSPC inside, and
the host's free space moves by what was written and never past the image's size. Stack and slugs are squashfs images,
mounted once per instance while somebody uses them. Nothing is copied at start but the empty template.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from sandbox import hostcmd
from sandbox.config import Config
from sandbox.errors import HostError
from sandbox.host import journal as journals
from sandbox.host import syscalls as sys
from sandbox.host.journal import Journal
from sandbox.host.stack import identity
from sandbox.policy.policy import Policy
from sandbox.policy.spec import SlotPaths
from sandbox.units import format_bytes

_GUARDED = sys.MS_NOSUID | sys.MS_NODEV


def template(config: Config, policy: Policy) -> str:
    """The empty, formatted image for that many bytes and inodes; made once, then copied.

    No journal: a dyno's disk never outlives its dyno. No reserved blocks, no resize inode: all bytes are the app's.
    """
    path = f"{config.disks_dir}/template-{policy.disk_bytes}-{policy.disk_inodes}.ext4"
    if os.path.exists(path):
        return path
    import shutil  # the first dyno of a size pays for it, not every start

    draft = f"{path}.{os.getpid()}"
    skeleton = f"{draft}.d"
    try:
        for folder in ("upper", "work", "tmp", "vartmp", "fixed/empty", "fixed/gate", "fixed/etc"):
            os.makedirs(f"{skeleton}/{folder}", mode=0o755)
        os.makedirs(f"{skeleton}/fixed/sys/fs/cgroup/memory")
        os.makedirs(f"{skeleton}/fixed/sys/devices/system/cpu")
        with open(draft, "wb") as file:
            os.ftruncate(file.fileno(), policy.disk_bytes)
        hostcmd.run(
            [
                hostcmd.require("mkfs.ext4", "e2fsprogs"),
                *("-q", "-F", "-m", "0", "-N", str(policy.disk_inodes), "-b", "4096"),
                *("-O", "^has_journal,^resize_inode,sparse_super2", "-d", skeleton),
                *("-E", "lazy_itable_init=1,nodiscard,root_owner=0:0", draft),
            ]
        )
        os.rename(draft, path)
    finally:
        shutil.rmtree(skeleton, ignore_errors=True)
        if os.path.exists(draft):
            os.unlink(draft)
    return path


def copy_sparse(source: str, target: str, *, needed: int = 0) -> None:
    """Copies the data of a sparse file and leaves its holes; HostError when the host's disk is full."""
    free = os.statvfs(os.path.dirname(target))
    if free.f_bavail * free.f_frsize < needed:
        raise HostError(
            f"the disk that holds {os.path.dirname(target)} has {format_bytes(free.f_bavail * free.f_frsize)} free, "
            f"a dyno needs {format_bytes(needed)} to start.",
            hint="`sandbox gc` removes leftovers; free space on the host, or use another --state-dir.",
        )
    fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        size = os.fstat(fd).st_size
        os.ftruncate(out, size)
        position = 0
        while position < size:
            try:
                begin = os.lseek(fd, position, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    break
                raise
            position = os.lseek(fd, begin, os.SEEK_HOLE)
            while begin < position:
                done = os.copy_file_range(fd, out, position - begin, begin, begin)
                if done == 0:
                    break
                begin += done
    finally:
        os.close(fd)
        os.close(out)


def mount_image(image: str, target: str, fstype: str, *, read_only: bool, data: str = "") -> None:
    """Mounts a file system image through a loop device that goes away with the mount."""
    fd, device = sys.attach_loop(image, read_only=read_only)
    try:
        sys.mount(device, target, fstype, _GUARDED | (sys.MS_RDONLY if read_only else sys.MS_NOATIME), data)
    except OSError as error:
        raise HostError(
            f"the kernel does not mount {image} as {fstype}: {error.strerror}.",
            hint="sandbox doctor says what is missing.",
        ) from error
    finally:
        os.close(fd)


def is_mount(path: str) -> bool:
    """Whether something is mounted exactly there (os.path.ismount misses bind mounts)."""
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        return any(line.split(" ", 5)[4] == path for line in file)


@contextmanager
def _layers_lock(config: Config) -> Iterator[None]:
    fd = os.open(f"{config.run_dir}/layers.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def hold_layer(config: Config, journal: Journal, image: str) -> str:
    """Mounts a squashfs image, unless another dyno already did, and returns where; the journal is the reference."""
    target = f"{config.layers_dir}/{os.path.basename(image).removesuffix('.squashfs')}"
    with _layers_lock(config):
        journal.record("layer", target)
        os.makedirs(target, mode=0o755, exist_ok=True)
        if not is_mount(target):
            mount_image(image, target, "squashfs", read_only=True)
            if _kernel() < _MAPPED_SQUASHFS:
                mount_image(_copy(image, target), target, "ext4", read_only=True)
    return target


# Linux 6.2 maps the owners of a squashfs mount, 5.12 those of an ext4 mount.
_MAPPED_SQUASHFS = (6, 2)


def _kernel() -> tuple[int, int]:
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int(re.split(r"\D", minor)[0])


def _copy(image: str, tree: str) -> str:
    """The same tree as an ext4 image, made when it is first needed. ``tree``: where the squashfs image is mounted.

    It lies beside the image, with the identity that it had when it was made: whatever was done to it since, it is made
    anew, from an image that was checked.
    """
    path = image.removesuffix(".squashfs") + ".ext4"
    seal = f"{path}.json"
    try:
        with open(seal, encoding="utf-8") as file:
            if json.load(file) == identity(path):
                return path
    except (FileNotFoundError, ValueError):
        pass
    draft = f"{path}.new"
    used = count = 0
    for folder, folders, names in os.walk(tree):
        count += len(folders) + len(names)
        used += sum((os.lstat(f"{folder}/{name}").st_size + 8191) // 4096 * 4096 for name in (*folders, *names))
    try:
        with open(draft, "wb") as out:
            os.ftruncate(out.fileno(), used + count * 512 + (16 << 20))
        hostcmd.run(
            [
                *(
                    hostcmd.require("mkfs.ext4", "e2fsprogs"),
                    "-q",
                    "-F",
                    "-m",
                    "0",
                    "-N",
                    str(count + 64),
                    "-b",
                    "4096",
                ),
                *("-O", "^has_journal,^resize_inode", "-d", tree, "-E", "root_owner=0:0", draft),
            ],
            timeout_s=600,
        )
        # An app would find it in its folder.
        hostcmd.run([hostcmd.require("debugfs", "e2fsprogs"), "-w", "-R", "rmdir /lost+found", draft])
        os.chmod(draft, 0o400)
        os.rename(draft, path)
    finally:
        if os.path.exists(draft):
            os.unlink(draft)
    with open(f"{seal}.new", "w", encoding="utf-8") as file:
        json.dump(identity(path), file)
    os.rename(f"{seal}.new", seal)
    return path


def release_layer(config: Config, journal: Journal, target: str) -> None:
    """Lets the layer go, and unmounts it when no other journal refers to it.

    The journal says so before the others are asked: of two dynos that end together, each would otherwise still see
    the other's reference, and the layer would stay.
    """
    with _layers_lock(config):
        journal.record("unlayer", target)
        if any(journals.holds_layer(path, target) for path in journals.paths(config.journal_dir)):
            return
        unmount(target)
        remove_folder(target)


def release_unused_layers(config: Config) -> list[str]:
    """Unmounts every layer that no journal refers to; returns which."""
    released = []
    with _layers_lock(config):
        used = journals.paths(config.journal_dir)
        for name in os.listdir(config.layers_dir):
            target = f"{config.layers_dir}/{name}"
            if not any(journals.holds_layer(path, target) for path in used):
                unmount(target)
                remove_folder(target)
                released.append(target)
    return released


def unmount(target: str) -> None:
    """Unmounts all that is stacked on ``target``; lazily, so that a straggler cannot keep it."""
    try:
        while True:
            sys.umount(target, detach=True)
    except OSError as error:
        # EINVAL: nothing is mounted there (any more); ENOENT: it never got that far.
        if error.errno not in (errno.EINVAL, errno.ENOENT):
            raise


def remove_folder(path: str) -> None:
    """Removes an empty folder, or one that never was."""
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return


def remove_tree(path: str) -> None:
    """Removes a folder of ours with all below it; refuses to cross into a mount that is still there."""
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        for line in file:
            if line.split(" ", 5)[4].startswith(f"{path}/"):
                raise HostError(f"{path} still holds a mount and was not removed.")
    for folder, names, files in os.walk(path, topdown=False):
        for name in files:
            os.unlink(f"{folder}/{name}")
        for name in names:
            (os.unlink if os.path.islink(f"{folder}/{name}") else os.rmdir)(f"{folder}/{name}")
    remove_folder(path)


def build(
    config: Config,
    journal: Journal,
    folder: str,
    *,
    image: str,
    policy: Policy,
    stack_layer: str | None,
    slug_layer: str,
    userns_fd: int,
    root_uid: int,
    uid: int,
    files: dict[str, str],
) -> SlotPaths:
    """Makes the dyno's file system below ``folder`` and returns where its parts are.

    ``root_uid``: the host id that the dyno sees as root (its range's first with a user namespace, else 0).
    ``files``: content of the fixed files, by path below ``fixed``.
    """
    paths = SlotPaths(root=f"{folder}/root", app=f"{folder}/app", disk=f"{folder}/disk", fixed=f"{folder}/fixed")
    slug = f"{folder}/slug"
    for path in (paths.root, paths.app, paths.disk, paths.fixed, slug, f"{folder}/stack", f"{folder}/empty"):
        os.mkdir(path, 0o755)
    journal.record("image", image)
    copy_sparse(template(config, policy), image, needed=32 * 1024 * 1024)
    journal.record("mount", paths.disk)
    # A damaged image must not panic or hang the host: it turns read-only and the app sees EROFS.
    mount_image(image, paths.disk, "ext4", read_only=False, data="errors=remount-ro")
    _fill(paths.disk, files, root_uid=root_uid, uid=uid)
    if stack_layer is not None:
        journal.record("mount", f"{folder}/stack")
        guards = sys.ATTR_RDONLY | sys.ATTR_NOSUID | sys.ATTR_NODEV
        sys.clone_mount(stack_layer, f"{folder}/stack", attributes=guards, userns_fd=userns_fd)
        # Two lower layers and no upper: read-only, and with inodes of this dyno's own. On the shared inodes a lock
        # or an inotify watch of one dyno would reach the others.
        journal.record("mount", paths.root)
        _overlay(folder, "root", "lowerdir=stack:empty")
    journal.record("mount", slug)
    _clone_slug(slug_layer, slug, userns_fd)
    journal.record("mount", paths.app)
    _overlay(folder, "app", "lowerdir=slug,upperdir=disk/upper,workdir=disk/work,volatile")
    journal.record("mount", paths.fixed)
    guards = sys.ATTR_RDONLY | sys.ATTR_NOSUID | sys.ATTR_NODEV | sys.ATTR_NOEXEC
    sys.clone_mount(f"{paths.disk}/fixed", paths.fixed, attributes=guards)
    return paths


def _clone_slug(layer: str, target: str, userns_fd: int) -> None:
    try:
        sys.clone_mount(
            layer, target, attributes=sys.ATTR_RDONLY | sys.ATTR_NOSUID | sys.ATTR_NODEV, userns_fd=userns_fd
        )
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise HostError(
            "this kernel cannot map the owners of a mount.",
            hint="Linux 5.12 and newer can; sandbox doctor says what else is missing.",
        ) from error


def _overlay(folder: str, target: str, layers: str) -> None:
    """Mounts an overlay of folders of the slot. Relative names: an overlay's options show in the dyno's mountinfo.

    The feature switches pin what the kernel would otherwise take from its build configuration. ``volatile`` (in
    ``layers``) skips the sync of a file system that is thrown away.
    """
    before = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.chdir(folder)
        features = "metacopy=off,redirect_dir=off,index=off,xino=off"
        sys.mount("overlay", target, "overlay", _GUARDED, f"{layers},{features}")
    finally:
        os.fchdir(before)
        os.close(before)


def _fill(disk: str, files: dict[str, str], *, root_uid: int, uid: int) -> None:
    """Gives the template's folders their owners and writes the files that the dyno may only read."""
    for name, mode in (("upper", 0o755), ("tmp", 0o1777), ("vartmp", 0o1777)):
        os.chown(f"{disk}/{name}", uid, uid)
        os.chmod(f"{disk}/{name}", mode)
    for name, content in files.items():
        path = f"{disk}/fixed/{name}"
        with open(path, "w", encoding="utf-8") as file:
            file.write(content)
        os.chmod(path, 0o644)
    # Readable by whatever id the engine gave the gate: a wrong one is the verification's to name.
    os.mkfifo(f"{disk}/fixed/gate/fifo")
    os.chmod(f"{disk}/fixed/gate/fifo", 0o444)
    for path, folders, names in os.walk(f"{disk}/fixed"):
        for name in (*folders, *names):
            os.chown(f"{path}/{name}", root_uid, root_uid)
    os.chown(f"{disk}/fixed", root_uid, root_uid)
    os.chmod(disk, 0o711)  # noqa: S103 - the dyno's ids must pass through; nobody may list
