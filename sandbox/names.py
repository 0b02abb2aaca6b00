"""Every name we give to something on the host comes from here, and carries the instance's host id.

Two instances (two state directories) on one machine therefore never meet, and whatever a crash leaves behind
can be told from what is not ours.
"""

from __future__ import annotations

import hashlib
import os
import re

_PROCESS_TYPE = re.compile(r"[-\w]{1,128}", re.ASCII)
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_CONTAINER_ID = re.compile(r"sbx-[0-9a-f]{8}-[0-9a-f]{8}")


def host_id(state_dir: str) -> str:
    """Eight hexadecimal digits that stand for one instance: the digest of its state directory's real path."""
    return hashlib.sha256(os.path.realpath(state_dir).encode()).hexdigest()[:8]


def new_container_id(host: str) -> str:
    """The id of one dyno's slot, container, cgroup, journal and disk image; random, never reused."""
    return f"sbx-{host}-{os.urandom(4).hex()}"


def is_container_id(name: str, host: str) -> bool:
    return _CONTAINER_ID.fullmatch(name) is not None and name[4:12] == host


def cgroup_root(host: str) -> str:
    """The one cgroup, in every hierarchy, below which all cgroups of this instance live."""
    return f"/sandbox-{host}"


def cgroup_parent(host: str, container_id: str) -> str:
    return f"{cgroup_root(host)}/{container_id}"


def hostname(dyno: str) -> str:
    """``web.1`` as a host name: RFC 1123 knows no dot inside a label and no underscore."""
    return re.sub(r"[^a-z0-9-]", "-", dyno.lower())[:63].strip("-") or "dyno"


def is_process_type(text: str) -> bool:
    """Heroku's own pattern for a process type: 1 to 128 of letters, digits, ``_`` and ``-``, ASCII."""
    return _PROCESS_TYPE.fullmatch(text) is not None


def is_env_name(text: str) -> bool:
    """A POSIX environment variable name; anything else cannot pass through a shell."""
    return _ENV_NAME.fullmatch(text) is not None


def app_name(path: str) -> str:
    """The folder's name as an app name (``^[a-z][a-z0-9-]{1,28}[a-z0-9]$`` at Heroku), as near as it gets."""
    slug = re.sub(r"[^a-z0-9]+", "-", os.path.basename(os.path.realpath(path)).lower()).strip("-")
    if not slug or not slug[0].isalpha():
        slug = f"app-{slug}".strip("-")
    return slug[:30].strip("-")
