"""What was done to the host for one dyno, written down before it is done; undone from here after a crash.

One file per dyno, one JSON line per step. The living owner holds an flock on it: the kernel drops that lock when the
owner dies, however it dies, so "is the owner alive" needs no pid and cannot be fooled by a reused one.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from typing import Literal

Op = Literal["folder", "mount", "layer", "unlayer", "uids", "cgroup", "container", "image", "network"]
Step = dict[str, str]


class Journal:
    """An open journal. Create it with ``start`` for a new dyno or ``adopt`` for what a dead owner left."""

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self._fd = fd

    @classmethod
    def start(cls, folder: str, container_id: str, header: dict[str, object]) -> Journal:
        """A new journal whose first line is ``header``.

        The lock is taken on a name nobody scans for, then the file gets its real name: a scan can never see a
        journal whose owner is alive and not yet locked.
        """
        path = f"{folder}/{container_id}.jsonl"
        draft = f"{folder}/.{container_id}.new"
        fd = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(fd, _line(header))
        os.rename(draft, path)
        return cls(path, fd)

    @classmethod
    def adopt(cls, path: str) -> Journal | None:
        """The journal of a dead owner, now locked by us; None while the owner lives or when the file is gone."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its owner may have removed it between our open and our lock.
            if os.fstat(fd).st_nlink > 0:
                return cls(path, fd)
        except BlockingIOError:
            pass
        os.close(fd)
        return None

    def record(self, op: Op, name: str, **more: str) -> None:
        """Writes down a step that is about to be taken."""
        os.write(self._fd, _line({"op": op, "name": name, **more}))

    def header(self) -> dict[str, object]:
        return next(_lines(self.path), {})

    def steps(self) -> list[Step]:
        """All steps recorded so far, oldest first."""
        return [{k: str(v) for k, v in line.items()} for line in _lines(self.path) if "op" in line]

    def close(self) -> None:
        """Lets go of the journal and leaves it: what it names is still there."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def finish(self) -> None:
        """Removes the journal: everything it named is undone."""
        os.unlink(self.path)
        self.close()


def headers(folder: str) -> Iterator[tuple[str, dict[str, object]]]:
    """(path, header) of every journal there."""
    for path in paths(folder):
        header = next(_lines(path), None)
        if header is not None:
            yield path, header


def paths(folder: str) -> list[str]:
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    return [f"{folder}/{name}" for name in names if name.endswith(".jsonl")]


def holds_layer(path: str, target: str) -> bool:
    """Whether the dyno with the journal at ``path`` refers to that layer: took it, and did not let it go since."""
    held = False
    for line in _lines(path):
        if line.get("name") == target and line.get("op") in ("layer", "unlayer"):
            held = line["op"] == "layer"
    return held


def is_live(path: str) -> bool:
    """Whether the owner of the journal lives, that is, holds its lock."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _line(value: dict[str, object] | dict[str, str]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _lines(path: str) -> Iterator[dict[str, object]]:
    try:
        with open(path, "rb") as file:
            for line in file:
                try:
                    value = json.loads(line)
                except ValueError:
                    return  # a torn last line: the step it announced was not taken
                if isinstance(value, dict):
                    yield value
    except FileNotFoundError:
        return
