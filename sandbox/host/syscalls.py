"""The system calls that Python does not offer, each a thin function that raises OSError with the path.

Numbers are x86-64 and arm64 alike: these calls came after the tables were unified (Linux 5.2).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import struct
import time

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]
_libc.syscall.restype = ctypes.c_long

# include/uapi/linux/mount.h
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_NOATIME, MS_BIND, MS_REC, MS_PRIVATE, MS_SHARED = 32, 1024, 4096, 1 << 14, 1 << 18, 1 << 20
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_MOUNT_SETATTR = 428, 429, 442
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
_AT_FDCWD, _AT_EMPTY_PATH, _AT_SYMLINK_NOFOLLOW = -100, 0x1000, 0x100
_MOVE_MOUNT_F_EMPTY_PATH = 4
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV, ATTR_NOEXEC, _ATTR_IDMAP = 1, 2, 4, 8, 0x100000

# include/uapi/linux/loop.h
_LOOP_CTL_GET_FREE, _LOOP_CONFIGURE, _LOOP_CLR_FD = 0x4C82, 0x4C0A, 0x4C01
_LO_FLAGS_READ_ONLY, _LO_FLAGS_AUTOCLEAR = 1, 4

# include/uapi/linux/sched.h
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x20000, 0x10000000, 0x40000000


def _check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), what)
    return int(result)


def mount(source: str, target: str, fstype: str, flags: int, data: str = "") -> None:
    """Mounts, like the call in mount(2); OSError names type and target."""
    _check(
        _libc.mount(source.encode(), target.encode(), fstype.encode(), flags, data.encode() or None),
        f"mount {fstype} at {target}",
    )


def umount(target: str, *, detach: bool = False) -> None:
    """umount2(2) without following a symlink; ``detach`` is lazy: it succeeds while something still looks inside."""
    _check(_libc.umount2(target.encode(), UMOUNT_NOFOLLOW | (MNT_DETACH if detach else 0)), f"umount {target}")


def unshare(flags: int) -> None:
    """Leaves the namespaces of those CLONE_NEW flags, see unshare(2)."""
    _check(_libc.unshare(flags), "unshare")


def setns(fd: int, kind: int) -> None:
    """Enters the namespace behind a descriptor, see setns(2)."""
    _check(_libc.setns(fd, kind), "setns")


def clone_mount(source: str, target: str, *, attributes: int, userns_fd: int | None = None) -> None:
    """A copy of the mount at ``source`` on ``target`` with more restrictions and, given a user namespace, its id map.

    open_tree(2), mount_setattr(2) and move_mount(2): the copy gets its restrictions before anybody can see it, and
    one call sets what a bind mount needs a racy remount for.
    """
    tree = take_tree(source)
    try:
        idmap = 0 if userns_fd is None else _ATTR_IDMAP
        # struct mount_attr: attr_set, attr_clr, propagation, userns_fd; private from birth.
        attr = struct.pack("=QQQQ", attributes | idmap, 0, MS_PRIVATE, userns_fd or 0)
        _check(_libc.syscall(_SYS_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, attr, len(attr)), f"mount_setattr {source}")
        put_tree(tree, target)
    finally:
        os.close(tree)


def take_tree(source: str) -> int:
    """A descriptor of a copy of the mount at ``source`` that is attached nowhere yet."""
    return _check(
        _libc.syscall(_SYS_OPEN_TREE, _AT_FDCWD, source.encode(), _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC),
        f"open_tree {source}",
    )


def put_tree(tree: int, target: str) -> None:
    """Attaches what ``take_tree`` returned, in the mount namespace that the caller is in now."""
    _check(
        _libc.syscall(_SYS_MOVE_MOUNT, tree, b"", _AT_FDCWD, target.encode(), _MOVE_MOUNT_F_EMPTY_PATH),
        f"move_mount {target}",
    )


def restrict_mount(target: str, *, attributes: int) -> None:
    """Adds restrictions to the mount at ``target``, in the caller's mount namespace, and makes it private."""
    attr = struct.pack("=QQQQ", attributes, 0, MS_PRIVATE, 0)
    _check(
        _libc.syscall(_SYS_MOUNT_SETATTR, _AT_FDCWD, target.encode(), _AT_SYMLINK_NOFOLLOW, attr, len(attr)),
        f"mount_setattr {target}",
    )


def attach_loop(image: str, *, read_only: bool) -> tuple[int, str]:
    """A loop device over ``image`` that detaches itself at its last close or unmount; returns (fd, device path).

    LOOP_CONFIGURE (5.8) sets file, flags and AUTOCLEAR in one step, so a crash at any point leaves no device behind.
    The caller closes the fd once the device is mounted.
    """
    backing = os.open(image, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    flags = _LO_FLAGS_AUTOCLEAR | (_LO_FLAGS_READ_ONLY if read_only else 0)
    # struct loop_config: fd, block_size, struct loop_info64 (5 × u64, 4 × u32, 64 + 64 + 32 bytes, 2 × u64), 8 × u64.
    name = image.encode()[-63:]
    info = struct.pack("=5Q4I64s64s32s2Q", 0, 0, 0, 0, 0, 0, 0, 0, flags, name, b"", b"", 0, 0)
    config = struct.pack("=II", backing, 4096) + info + bytes(64)
    try:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        try:
            deadline = time.monotonic() + 5.0
            while True:
                number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
                device = f"/dev/loop{number}"
                fd = os.open(device, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
                try:
                    fcntl.ioctl(fd, _LOOP_CONFIGURE, config)
                    return fd, device
                except OSError as error:
                    os.close(fd)
                    # Somebody else took the same free device between the two calls.
                    if error.errno != errno.EBUSY or time.monotonic() > deadline:
                        raise
        finally:
            os.close(control)
    finally:
        os.close(backing)


# Set inside the new user namespace, where the app can read but never raise them. One namespace of each kind is what
# the runtime makes for the dyno; with the count used up, unshare(2) fails with ENOSPC even without a system-call
# filter. 128 and 8192 are the kernel's own defaults for one user, here per dyno.
_USERNS_LIMITS = {
    **{f"max_{kind}_namespaces": 1 for kind in ("cgroup", "ipc", "mnt", "net", "pid", "uts")},
    "max_user_namespaces": 0,
    "max_time_namespaces": 0,
    "max_inotify_instances": 128,
    "max_inotify_watches": 8192,
    "max_fanotify_groups": 0,
    "max_fanotify_marks": 0,
}


def _write_if_there(path: str, text: str) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return  # a limit that this kernel does not have
    os.write(fd, text.encode())
    os.close(fd)


def become_child() -> None:
    """First in every forked child of ours: its signals are not its parent's.

    A child keeps the parent's handlers and shares its wakeup descriptor: one Ctrl-C on the terminal would arrive
    there once for each process.
    """
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def user_namespace(base: int, *, owner: int, count: int = 65536) -> int:
    """A descriptor of a new user namespace that maps 0..count-1 to base..base+count-1; nobody runs in it yet.

    A short-lived child creates it **as the host uid ``owner``**: the kernel charges inotify instances and
    namespaces to the creator, and all dynos created by host root would share one budget (measured: one dyno took
    all 128 inotify instances of every other).
    """
    ready_r, ready_w = os.pipe()
    done_r, done_w = os.pipe()
    pid = os.fork()
    if pid == 0:  # pragma: no cover - the child never returns
        try:
            become_child()
            os.close(done_w)
            os.setgroups([])
            os.setresgid(owner, owner, owner)
            os.setresuid(owner, owner, owner)
            unshare(CLONE_NEWUSER)
            for name, value in _USERNS_LIMITS.items():
                _write_if_there(f"/proc/sys/user/{name}", str(value))
            os.write(ready_w, b"+")
            os.read(done_r, 1)
        finally:
            os._exit(0)
    try:
        os.close(ready_w)
        os.close(done_r)
        if os.read(ready_r, 1) != b"+":
            raise OSError(errno.EPERM, "the kernel makes no user namespace for an unprivileged user", "unshare")
        for name in ("uid_map", "gid_map"):
            with open(f"/proc/{pid}/{name}", "w", encoding="ascii") as file:
                file.write(f"0 {base} {count}\n")
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(ready_r)
        os.close(done_w)
        os.waitpid(pid, 0)
