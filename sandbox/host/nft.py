"""nftables through its own library, in one network namespace: one text, one transaction.

libnftables instead of the ``nft`` program: an admission is on every start's way, and starting a program takes longer
than the transaction. The text that goes in is built from numbers, ``ipaddress`` values and our own names only.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from typing import Any

from sandbox.errors import HostError
from sandbox.units import escape

# nftables/libnftables.h
_STATELESS, _HANDLE, _JSON, _NUMERIC, _TERSE = 1 << 2, 1 << 3, 1 << 4, (1 << 7) | (1 << 8) | (1 << 9), 1 << 11
_loaded: list[ctypes.CDLL] = []


def _library() -> ctypes.CDLL:
    if not _loaded:
        try:
            library = ctypes.CDLL("libnftables.so.1")
        except OSError as error:
            raise HostError("libnftables is not installed.", hint="apt-get install nftables") from error
        library.nft_ctx_new.restype = ctypes.c_void_p
        library.nft_ctx_new.argtypes = [ctypes.c_uint32]
        library.nft_ctx_free.argtypes = [ctypes.c_void_p]
        library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
        library.nft_ctx_output_set_flags.argtypes = [ctypes.c_void_p, ctypes.c_uint]
        for name in ("output", "error"):
            getattr(library, f"nft_ctx_buffer_{name}").argtypes = [ctypes.c_void_p]
            get = getattr(library, f"nft_ctx_get_{name}_buffer")
            get.argtypes, get.restype = [ctypes.c_void_p], ctypes.c_char_p
        _loaded.append(library)
    return _loaded[0]


class NftError(HostError):
    """The kernel or the parser refused a text; nothing of it was applied."""


class NoSuchTable(NftError):
    """What the text speaks of is not there."""


def elements(item: dict[str, Any], kind: str = "set") -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """The elements of a set or map as it was listed: the parts of each key, and what stands beside it (a counter)."""
    for element in item.get(kind, {}).get("elem", []):
        key = element[0] if kind == "map" else element
        body = key.get("elem", {}) if isinstance(key, dict) else {}
        value = body.get("val", key)
        parts = value["concat"] if isinstance(value, dict) and "concat" in value else [value]
        if kind == "map":
            body = {**body, "data": element[1]}
        yield parts, body


class Nft:
    """nftables of the network namespace in which this object was made, whatever the caller's is later."""

    def __init__(self) -> None:
        self._library = _library()
        self._context: int | None = self._library.nft_ctx_new(0)
        if not self._context:
            raise HostError("nftables does not answer.", hint="sandbox doctor")
        self._library.nft_ctx_buffer_output(self._context)
        self._library.nft_ctx_buffer_error(self._context)

    def run(self, text: str, *, flags: int = 0) -> str:
        """Runs one text as one transaction; NftError with the first line of what nftables says, nothing applied."""
        self._library.nft_ctx_output_set_flags(self._context, flags)
        status = self._library.nft_run_cmd_from_buffer(self._context, text.encode("ascii"))
        out = (self._library.nft_ctx_get_output_buffer(self._context) or b"").decode("utf-8", "replace")
        said = (self._library.nft_ctx_get_error_buffer(self._context) or b"").decode("utf-8", "replace")
        if status != 0:
            kind = NoSuchTable if "No such file" in said else NftError
            reason = escape(said.strip().splitlines()[0]) if said.strip() else "it gives no reason"
            if "Too many open files in system" in said:  # ENFILE, in nftables' sense
                reason = "a set is full."
            raise kind(
                f"nftables refused a change: {reason}",
                hint="sandbox doctor",
                details=escape(said),
            )
        return out

    def listing(self, what: str, *, state: bool = False, terse: bool = False) -> list[dict[str, Any]]:
        """``list WHAT`` as nftables' own JSON objects; an empty list when there is no such thing."""
        flags = _JSON | _HANDLE | _NUMERIC | (0 if state else _STATELESS) | (_TERSE if terse else 0)
        try:
            text = self.run(f"list {what}", flags=flags)
        except NoSuchTable:
            return []
        return list(json.loads(text)["nftables"]) if text else []

    def text(self, what: str, *, terse: bool = False) -> str:
        """``list WHAT`` as text, as ``nft`` prints it: with counters, or ``terse``, without the elements of sets."""
        return self.run(f"list {what}", flags=_TERSE | _STATELESS if terse else 0)

    def exists(self, what: str) -> bool:
        return bool(self.listing(what, terse=True))

    def close(self) -> None:
        if self._context:
            self._library.nft_ctx_free(self._context)
            self._context = None
