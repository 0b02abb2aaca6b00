"""Slugs: content-addressed squashfs images of an app, packed without privilege, checked before use."""

from __future__ import annotations

import json
import os
from typing import NamedTuple

from sandbox import hostcmd
from sandbox.config import Config
from sandbox.errors import AppError, HostError
from sandbox.host.stack import file_digest, identity
from sandbox.policy.spec import APP_UID
from sandbox.units import format_bytes

# Heroku's hard limit.
MAX_BYTES = 500 * 1024 * 1024
_NOBODY = "65534"


class Slug(NamedTuple):
    """A packed app. ``digest``: sha256 of the image."""

    digest: str
    image: str
    size_bytes: int


def find(config: Config, key: str) -> Slug | None:
    """The slug cached under that key, after a check of its content; None when there is none.

    Raises AppError (R17) when the image is not the one that was packed.
    """
    try:
        with open(_index(config, key), encoding="utf-8") as file:
            entry = json.load(file)
        digest, seen = str(entry["digest"]), entry["stat"]
    except (FileNotFoundError, ValueError, KeyError):
        return None
    image = _image(config, digest)
    try:
        now = identity(image)
    except FileNotFoundError:
        return None
    if now != seen:
        actual = file_digest(image)
        if actual != digest:
            raise AppError(
                f"Error R17 (Checksum error): the slug {image} was altered. Expected: SHA256:{digest} "
                f"Actual: SHA256:{actual}; nothing was started.",
                hint=f"remove {image}; the next run builds it anew. Find out who wrote to it.",
            )
        _remember(config, key, digest)
    return Slug(digest, image, now[2])


def pack(config: Config, tree: str, key: str) -> Slug:
    """Packs a tree of plain files that we made into a slug and remembers it under ``key``.

    mksquashfs runs as nobody, without privileges: what it compresses is the customer's. Times and owners are
    fixed, so the same files give the same image.
    """
    work = f"{config.slugs_dir}/.{key}.{os.getpid()}"
    try:
        with open(work, "wb") as file:
            os.fchown(file.fileno(), int(_NOBODY), int(_NOBODY))
        drop = (
            "--reuid",
            _NOBODY,
            "--regid",
            _NOBODY,
            "--clear-groups",
            "--no-new-privs",
            "--bounding-set=-all",
            "--inh-caps=-all",
        )
        owner = ("-force-uid", str(APP_UID), "-force-gid", str(APP_UID), "-all-time", "1", "-mkfs-time", "1")
        hostcmd.run(
            [
                *(hostcmd.require("setpriv", "util-linux"), *drop, hostcmd.require("mksquashfs", "squashfs-tools")),
                *(
                    tree,
                    work,
                    "-noappend",
                    "-no-xattrs",
                    "-no-progress",
                    "-quiet",
                    "-comp",
                    "zstd",
                    "-Xcompression-level",
                    "3",
                    *owner,
                ),
            ],
            timeout_s=600,
            env=hostcmd.ENVIRONMENT,
        )
        size = os.stat(work).st_size
        if size > MAX_BYTES:
            raise AppError(
                f"the slug has {format_bytes(size)}, at most {format_bytes(MAX_BYTES)} are allowed; "
                "nothing was started.",
                hint="name what the app does not need in .slugignore.",
            )
        # Before the digest: from here on nobody can write to it.
        os.chown(work, 0, 0)
        os.chmod(work, 0o400)
        digest = file_digest(work)
        os.rename(work, _image(config, digest))
    except HostError as error:
        raise HostError(
            f"the slug could not be packed: {error.message}", hint="is the disk full? sandbox gc", details=error.details
        ) from error
    finally:
        if os.path.exists(work):
            os.unlink(work)
    _remember(config, key, digest)
    return Slug(digest, _image(config, digest), size)


def _image(config: Config, digest: str) -> str:
    return f"{config.slugs_dir}/{digest}.squashfs"


def _index(config: Config, key: str) -> str:
    return f"{config.slugs_dir}/{key}.json"


def _remember(config: Config, key: str, digest: str) -> None:
    draft = f"{_index(config, key)}.{os.getpid()}"
    with open(draft, "w", encoding="utf-8") as file:
        json.dump({"digest": digest, "stat": identity(_image(config, digest))}, file)
    os.rename(draft, _index(config, key))
