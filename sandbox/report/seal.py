"""Reports that cannot be altered unnoticed: canonical bytes, a digest, a signature of this host, a chain of them.

A signature says that this host's key signed these bytes, and that they come after the report before. It does not say
that this host's root was honest.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from sandbox.config import Config
from sandbox.errors import HostError, SandboxError

Document = dict[str, Any]
MAX_KEPT, MAX_AGE_S = 200, 90 * 86400
MAX_BYTES = 32 << 20
_ALGORITHM = "ed25519 over the hexadecimal sha256 of the canonical form without this field"


class ReportError(SandboxError):
    """A report file that is not what it should be. Exit code 3: neither a pass nor a failure of the wall."""

    exit_code = 3


class Verified(NamedTuple):
    """``key``: fingerprint of the key that signed; ``ours``: whether it is this host's; ``chained``: its place."""

    key: str
    ours: bool
    chained: str


def canonical(value: object) -> bytes:
    """The one way to write a value down: sorted keys, no spaces, ASCII. As RFC 8785 does, for what we write."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


def _folder(config: Config) -> str:
    path = f"{config.state_dir}/reports"
    os.makedirs(path, mode=0o700, exist_ok=True)
    return path


@contextmanager
def _locked(config: Config) -> Iterator[str]:
    folder = _folder(config)
    fd = os.open(f"{folder}/.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(fd)


def _key(folder: str) -> Any:
    """The host's key, made at the first report; a file that others can read is refused."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    path = f"{folder}/host.key"
    try:
        status = os.stat(path)
    except FileNotFoundError:
        key = Ed25519PrivateKey.generate()
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        draft = f"{path}.{os.getpid()}"
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(pem)
        os.rename(draft, path)
        with open(f"{folder}/host.pub", "wb") as file:
            file.write(
                key.public_key().public_bytes(
                    serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
                )
            )
        return key
    if status.st_mode & 0o077 or status.st_uid != os.geteuid():
        raise HostError(f"{path} can be read by others.", hint=f"remove {path}: the next report makes another key.")
    with open(path, "rb") as file:
        return serialization.load_pem_private_key(file.read(), None)


def _raw(public: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization

    data: bytes = public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return data


def keep(config: Config, document: Document) -> tuple[Document, str]:
    """Seals the document, chains it to the one before, keeps it; returns it and its path. Old ones are dropped."""
    with _locked(config) as folder:
        previous, number = _last(folder)
        key = _key(folder)
        sealed = {**document, "previous": previous, "number": number + 1}
        digest = hashlib.sha256(canonical(sealed)).hexdigest()
        signature = key.sign(digest.encode("ascii"))
        sealed["seal"] = {
            "digest": digest,
            "key": _raw(key.public_key()).hex(),
            "signature": signature.hex(),
            "algorithm": _ALGORITHM,
        }
        path = f"{folder}/{number + 1:08}-{digest[:12]}.json"
        draft = f"{folder}/.{os.getpid()}.new"
        with open(draft, "wb") as file:
            file.write(canonical(sealed) + b"\n")
        os.chmod(draft, 0o600)
        os.rename(draft, path)
        with open(f"{draft}.last", "wb") as file:
            file.write(canonical({"digest": digest, "number": number + 1}))
        os.rename(f"{draft}.last", f"{folder}/.last")
        _drop_old(folder)
    return sealed, path


def kept(config: Config) -> list[str]:
    """Paths of the reports that are kept, oldest first."""
    return _kept(_folder(config))


def _kept(folder: str) -> list[str]:
    return [f"{folder}/{name}" for name in sorted(os.listdir(folder)) if name[:8].isdigit() and name.endswith(".json")]


def _last(folder: str) -> tuple[str, int]:
    """Digest and number of the last report that was made, there or not: numbers are never used again."""
    path = f"{folder}/.last"
    try:
        with open(path, "rb") as file:
            values = json.loads(file.read())
        return str(values["digest"]), int(values["number"])
    except FileNotFoundError:
        return "", 0
    except (ValueError, KeyError, TypeError) as error:
        raise HostError(
            f"{path} is damaged: the chain of reports cannot go on from it.",
            hint="keep the folder as evidence and move it away.",
        ) from error


def _drop_old(folder: str) -> None:
    paths = _kept(folder)
    oldest = time.time() - MAX_AGE_S
    for index, path in enumerate(paths[:-1]):
        if index < len(paths) - MAX_KEPT or os.stat(path).st_mtime < oldest:
            os.unlink(path)


def load(path: str) -> Document:
    """The document in a file, as far as it can be read. Raises ReportError, which says what to do."""
    return _parse(_bytes(path), path)


def _bytes(path: str) -> bytes:
    try:
        if os.path.getsize(path) > MAX_BYTES:
            raise ReportError(f"{path} is too large for a report.", hint="is it one?")
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}.", hint="sandbox report list") from error


def _parse(data: bytes, path: str) -> Document:
    try:
        document = json.loads(data, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ReportError(
            f"{path} is no report, or was cut short: {str(error)[:80]}.",
            hint="only the JSON form can be shown, compared and verified.",
        ) from error
    if not isinstance(document, dict) or document.get("kind") != "sandbox-isolation-report":
        raise ReportError(f"{path} is JSON, but no report of sandbox.", hint="sandbox report --format json -o FILE ...")
    from sandbox.report.model import SCHEMA_VERSION

    if document.get("schema") != SCHEMA_VERSION:
        raise ReportError(
            f"{path} has schema version {str(document.get('schema'))[:20]}, this release reads {SCHEMA_VERSION}.",
            hint="read it with the release that wrote it.",
        )
    from sandbox.report.document import check_shape

    check_shape(document, path)
    return document


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


def verify(config: Config, path: str, *, public_key: str = "") -> Verified:
    """Whether nobody altered a report since it was signed: every byte of the file counts.

    ``public_key``: a PEM file with the key that must have signed it; otherwise this host's. Raises ReportError.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    data = _bytes(path)
    document = _parse(data, path)
    seal = document.get("seal")
    try:
        digest, key, signature = str(seal["digest"]), str(seal["key"]), str(seal["signature"])  # type: ignore[index]
        # The seal is not under its own signature: each of its bytes must be the only one that it can be.
        if seal != {"digest": digest, "key": key, "signature": signature, "algorithm": _ALGORITHM} or any(
            bytes.fromhex(text).hex() != text for text in (digest, key, signature)
        ):
            raise ReportError(
                f"{path} was altered: its seal is not in the form that we write.", hint="do not rely on it."
            )
        content = {name: value for name, value in document.items() if name != "seal"}
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))
        public.verify(bytes.fromhex(signature), digest.encode("ascii"))
    except (TypeError, KeyError, ValueError) as error:
        raise ReportError(f"{path} carries no seal that could be checked.", hint="it is not signed.") from error
    except InvalidSignature as error:
        raise ReportError(f"{path} was altered: its signature is not of its key.", hint="do not rely on it.") from error
    if hashlib.sha256(canonical(content)).hexdigest() != digest:
        raise ReportError(f"{path} was altered: its content is not what was signed.", hint="do not rely on it.")
    if canonical(document) + b"\n" != data:
        raise ReportError(f"{path} was altered: these are not the bytes that were written.", hint="do not rely on it.")
    expected = _expected(config, public_key, serialization)
    if expected is not None and expected != key:
        raise ReportError(
            f"{path} is intact, but signed by key {key[:16]}, not by the expected {expected[:16]}.",
            hint="name the key of the host that made it: --key FILE",
        )
    return Verified(key, expected is not None, _place(config, document))


def _expected(config: Config, public_key: str, serialization: Any) -> str | None:
    path = public_key or f"{_folder(config)}/host.pub"
    try:
        with open(path, "rb") as file:
            return _raw(serialization.load_pem_public_key(file.read())).hex()
    except FileNotFoundError as error:
        if public_key:
            raise ReportError(f"there is no key file {public_key}.", hint="--key FILE, in PEM form") from error
        return None
    except (ValueError, AttributeError) as error:
        raise ReportError(f"{path} is no public key in PEM form.", hint="--key FILE") from error


def _place(config: Config, document: Document) -> str:
    """Whether the report before it, if it is kept, is the one that it names."""
    number, previous = document.get("number"), document.get("previous")
    if not isinstance(number, int) or not isinstance(previous, str):
        raise ReportError("it has no place in a chain.", hint="it was not made by sandbox report.")
    for path in kept(config):
        if os.path.basename(path)[:8] == f"{number - 1:08}":
            if load(path)["seal"]["digest"] != previous:
                raise ReportError(
                    f"report {number} is intact, but does not follow the kept report {number - 1}: a broken chain.",
                    hint="one of the two was replaced.",
                )
            return "it follows the kept report before it"
    return "the first one" if number == 1 else "the report before it is not kept here"
