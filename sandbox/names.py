"""Every name we give to something on the host comes from here, and carries the instance's host id.

Two instances (two state directories) on one machine therefore never meet, and whatever a crash leaves behind
can be told from what is not ours.
"""

from __future__ import annotations

import hashlib
import os

_WORD = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_")
_HEX = frozenset("0123456789abcdef")


def host_id(state_dir: str) -> str:
    """Eight hexadecimal digits that stand for one instance: the digest of its state directory's real path."""
    return hashlib.sha256(os.path.realpath(state_dir).encode()).hexdigest()[:8]


def new_container_id(host: str) -> str:
    """The id of one dyno's slot, container, cgroup, journal and disk image; random, never reused."""
    return f"sbx-{host}-{os.urandom(4).hex()}"


def is_container_id(name: str, host: str) -> bool:
    return name.startswith(f"sbx-{host}-") and len(name) == 21 and _HEX.issuperset(name[13:])


def cgroup(container_id: str) -> str:
    """The dyno's cgroup, in every hierarchy. At the top: every level costs a directory per v1 hierarchy."""
    return f"/{container_id}"


def hostname(dyno: str) -> str:
    """``web.1`` as a host name: RFC 1123 knows no dot inside a label and no underscore."""
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in dyno.lower())[:63].strip("-") or "dyno"


def is_process_type(text: str) -> bool:
    """Heroku's own pattern for a process type: 1 to 128 of letters, digits, ``_`` and ``-``, ASCII."""
    return 0 < len(text) <= 128 and (_WORD | {"-"}).issuperset(text)


def is_env_name(text: str) -> bool:
    """A POSIX environment variable name; anything else cannot pass through a shell."""
    return bool(text) and _WORD.issuperset(text) and not text[0].isdigit()


def app_name(path: str) -> str:
    """The folder's name as an app name (``^[a-z][a-z0-9-]{1,28}[a-z0-9]$`` at Heroku), as near as it gets."""
    base = os.path.basename(os.path.realpath(path)).lower()
    slug = "-".join("".join(c if c.isascii() and c.isalnum() else " " for c in base).split())
    if not slug or not slug[0].isalpha():
        slug = f"app-{slug}".strip("-")
    return slug[:30].strip("-")
