"""``sandbox.toml`` in the app's folder: what the app asks of its network. Hostile like the rest of the folder.

An app chooses among what no operator has to allow; nothing in it opens a range that is always denied, and the
operator's ``--egress`` wins over it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from sandbox.app.source import Source
from sandbox.errors import AppError
from sandbox.units import show

FILE = "sandbox.toml"
MAX_BYTES = 128 * 1024
_KEYS: dict[str, type] = {"egress": str, "allow": list, "smtp": bool}


class AppConfig(NamedTuple):
    """``egress``: a mode, or empty when the app does not say."""

    egress: str = ""
    allow: tuple[str, ...] = ()
    smtp: bool = False


def read(source: Source) -> AppConfig:
    """The app's own wishes; AppError with file and key for anything else than the keys there are."""
    if FILE not in source.names():
        return AppConfig()
    import tomllib  # only apps with such a file pay for the parser

    where = f"{source.path}/{FILE}"
    data = source.read(FILE, limit=MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise AppError(f"{where} has more than {MAX_BYTES} bytes; nothing was started.", hint="use larger networks.")
    try:
        values: dict[str, Any] = tomllib.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise AppError(f"{where}: {show(str(error))}; nothing was started.", hint='egress = "public"') from error
    for key, value in values.items():
        kind = _KEYS.get(key)
        if kind is None:
            raise AppError(f"{where}: unknown key {show(key)}; nothing was started.", hint="keys: " + ", ".join(_KEYS))
        if type(value) is not kind:
            raise AppError(f"{where}: {key} must be of type {kind.__name__}; nothing was started.")
    allow = values.get("allow", [])
    if not all(isinstance(item, str) for item in allow):
        raise AppError(
            f"{where}: allow must be a list of text; nothing was started.", hint='allow = ["api.example.com"]'
        )
    if allow and values.get("egress", "allow") != "allow":
        raise AppError(f'{where}: allow goes with egress = "allow"; nothing was started.', hint="leave one away.")
    mode = values.get("egress", "allow" if allow else "")
    return AppConfig(str(mode), tuple(allow), bool(values.get("smtp", False)))
