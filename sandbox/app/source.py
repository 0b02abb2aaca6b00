"""The app's folder, read as hostile bytes: every entry checked, hashed, and copied only through descriptors.

Nothing is followed: each folder is opened beneath its parent without symlinks, so a folder that is swapped for a
link while we look leads nowhere.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

from sandbox.errors import AppError
from sandbox.units import format_bytes, show

MAX_ENTRIES = 50_000
MAX_BUILT_ENTRIES = 200_000
MAX_DEPTH = 64
MAX_PATTERNS = 1000
# Heroku's hard limit for a slug; the source of one cannot be larger.
MAX_BYTES = 500 * 1024 * 1024
IGNORED = (".git", ".hg", ".svn", "__pycache__", "node_modules", ".venv", "venv")
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class Entry(NamedTuple):
    """One file, folder or link of the app. ``path`` is relative; ``content``: a link's target or a file's digest."""

    path: str
    kind: str  # file, folder, link
    executable: bool
    content: str


class Source(NamedTuple):
    """A folder as it was when it was read. ``digest`` covers every path, kind, executable bit and content."""

    path: str
    entries: tuple[Entry, ...]
    digest: str
    size_bytes: int

    def names(self) -> frozenset[str]:
        """The entries at the top."""
        return frozenset(entry.path for entry in self.entries if "/" not in entry.path)

    def read(self, name: str, *, limit: int = 1 << 20) -> bytes:
        """A file at the top of the app, at most ``limit`` bytes of it; AppError if it is not a plain file."""
        try:
            fd = os.open(f"{self.path}/{name}", _FILE)
        except OSError as error:
            raise AppError(f"{self.path}/{name} cannot be read: {error.strerror}.") from error
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise AppError(f"{self.path}/{name} is not a plain file.")
            return file.read(limit)


def scan(path: str, *, copy_to: str | None = None, built: bool = False) -> Source:
    """Reads the app's folder; with ``copy_to``, copies what it read there (plain files, folders, links; no bits).

    ``built``: the tree is the result of a build; nothing is ignored, and more files are allowed.

    Raises AppError for anything that cannot be in a slug, with the entry's name.
    """
    if not os.path.lexists(path):
        raise AppError(f"{path} does not exist; nothing was started.", hint="sandbox run PATH, the app's folder.")
    if not os.path.isdir(path):
        raise AppError(
            f"{path} is a file, not an app's folder; nothing was started.",
            hint=f"sandbox run {os.path.dirname(path) or '.'}",
        )
    try:
        # The operator may name the app by a link; what a build left may not be one.
        root = os.open(path, _FOLDER if built else _FOLDER & ~os.O_NOFOLLOW)
    except OSError as error:
        raise AppError(f"{path} cannot be read: {error.strerror}.") from error
    reader = _Reader(path, () if built else (*IGNORED, *_slugignore(root, path)), copy_to)
    if built:
        reader.most = MAX_BUILT_ENTRIES
    try:
        entries = sorted(reader.folder(root, "", 0), key=lambda entry: entry.path)
    finally:
        os.close(root)
    if not entries:
        raise AppError(
            f"{path} is empty, or all in it is ignored; nothing was started.",
            hint="put the app's files and a Procfile there.",
        )
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(f"{entry.path}\0{entry.kind}\0{entry.executable:d}\0{entry.content}\0".encode())
    return Source(path, tuple(entries), digest.hexdigest(), reader.size)


def leaves(link: str, target: str) -> bool:
    """Whether a link at relative path ``link`` leads out of the app's folder."""
    if target.startswith("/"):
        return True
    depth = link.count("/")
    down = False
    for part in target.split("/"):
        if part == "..":
            depth -= 1
            # Up after down: the way down may be a link itself, and then leads up from elsewhere.
            if down or depth < 0:
                return True
        elif part not in ("", "."):
            down = True
    return False


class _Reader:
    def __init__(self, path: str, ignore: tuple[str, ...], copy_to: str | None) -> None:
        self._root, self._copy = path, copy_to
        # One expression each: thousands of patterns times thousands of entries would take minutes.
        self._whole = re.compile("|".join(fnmatch.translate(p) for p in ignore) or "(?!)")
        self._last = re.compile("|".join(fnmatch.translate(p) for p in ignore if "/" not in p) or "(?!)")
        self._count = 0
        self.most = MAX_ENTRIES
        self.size = 0

    def folder(self, fd: int, prefix: str, depth: int) -> Iterator[Entry]:
        if depth > MAX_DEPTH:
            self._refuse(prefix, f"is nested more than {MAX_DEPTH} folders deep")
        for raw in sorted(os.listdir(fd)):
            name = prefix + raw
            if self._is_ignored(name, raw):
                continue
            self._count += 1
            if self._count > self.most:
                raise AppError(
                    f"{self._root} has more than {self.most} files and folders; nothing was started.",
                    hint="name what the app does not need in .slugignore.",
                )
            if not raw.isprintable():
                self._refuse(name, "has a control character, or a byte that is not UTF-8, in its name")
            status = os.stat(raw, dir_fd=fd, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                yield Entry(name, "folder", True, "")
                yield from self._enter(fd, raw, name, depth)
            elif stat.S_ISLNK(status.st_mode):
                yield self._link(fd, raw, name)
            elif stat.S_ISREG(status.st_mode):
                yield self._file(fd, raw, name)
            else:
                kinds = {
                    stat.S_IFIFO: "a FIFO",
                    stat.S_IFSOCK: "a socket",
                    stat.S_IFCHR: "a device",
                    stat.S_IFBLK: "a device",
                }
                self._refuse(name, f"is {kinds.get(stat.S_IFMT(status.st_mode), 'not a plain file')}")

    def _enter(self, fd: int, raw: str, name: str, depth: int) -> Iterator[Entry]:
        inner = self._open(raw, _FOLDER, fd, name)
        try:
            if self._copy is not None:
                os.mkdir(f"{self._copy}/{name}", 0o755)
            yield from self.folder(inner, f"{name}/", depth + 1)
        finally:
            os.close(inner)

    def _link(self, fd: int, raw: str, name: str) -> Entry:
        target = os.readlink(raw, dir_fd=fd)
        if leaves(name, target) or not target.isprintable():
            self._refuse(name, f"is a link that leaves the app, to {show(target)}")
        if self._copy is not None:
            os.symlink(target, f"{self._copy}/{name}")
        return Entry(name, "link", False, target)

    def _file(self, fd: int, raw: str, name: str) -> Entry:
        # O_NONBLOCK: were it swapped for a FIFO meanwhile, open would wait for a writer forever.
        file = self._open(raw, _FILE, fd, name)
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                self._refuse(name, "changed while it was read")
            executable = bool(status.st_mode & 0o100)
            self.size += status.st_size
            if self.size > MAX_BYTES:
                raise AppError(
                    f"{self._root} holds more than {format_bytes(MAX_BYTES)}; a slug may not. Nothing was started.",
                    hint="name what the app does not need in .slugignore.",
                )
            content = self._copy_file(file, name, executable, status.st_size)
        finally:
            os.close(file)
        return Entry(name, "file", executable, content)

    def _copy_file(self, file: int, name: str, executable: bool, size: int) -> str:  # noqa: FBT001 - internal
        digest = hashlib.sha256()
        out = -1
        if self._copy is not None:
            mode = 0o755 if executable else 0o644
            out = os.open(f"{self._copy}/{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            left = size
            while left > 0 and (piece := os.read(file, min(left, 1 << 20))):
                left -= len(piece)
                digest.update(piece)
                while out >= 0 and piece:
                    piece = piece[os.write(out, piece) :]
        finally:
            if out >= 0:
                os.close(out)
        return digest.hexdigest()

    def _open(self, raw: str, flags: int, fd: int, name: str) -> int:
        try:
            return os.open(raw, flags, dir_fd=fd)
        except OSError as error:
            if error.errno == errno.ELOOP:
                self._refuse(name, "changed while it was read")
            raise AppError(f"{self._root}/{name} cannot be read: {error.strerror}; nothing was started.") from error

    def _is_ignored(self, name: str, raw: str) -> bool:
        return bool(self._whole.fullmatch(name) or self._last.fullmatch(raw))

    def _refuse(self, name: str, reason: str) -> NoReturn:
        raise AppError(
            f"{self._root}: {show(name)} {reason}; nothing was started.",
            hint="remove it, or name it in .slugignore.",
        )


def _slugignore(root: int, path: str) -> tuple[str, ...]:
    """The patterns of .slugignore: one a line, ``#`` comments, no ``!`` (Heroku refuses it too)."""
    try:
        fd = os.open(".slugignore", _FILE, dir_fd=root)
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise AppError(f"{path}/.slugignore cannot be read: {error.strerror}.") from error
    with os.fdopen(fd, "rb") as file:
        text = file.read(1 << 20).decode("utf-8", "replace")
    patterns: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        if pattern.startswith("!"):
            raise AppError(f"{path}/.slugignore:{number}: {show(pattern)}: exceptions with ! are not supported.")
        if len(pattern) > 256 or pattern.count("*") > 8 or len(patterns) >= MAX_PATTERNS:
            raise AppError(
                f"{path}/.slugignore:{number}: at most {MAX_PATTERNS} patterns of 256 characters with 8 stars are read."
            )
        patterns.append(pattern.strip("/"))
    return tuple(patterns)
