"""Sizes, durations and foreign text, between what people write and what the kernel counts."""

from __future__ import annotations

from sandbox.errors import UsageError

MIB = 1024 * 1024
GIB = 1024 * MIB

_FACTORS = {"": 1, "K": 1024, "M": MIB, "G": GIB}
_SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_bytes(text: str, *, what: str) -> int:
    """``512M`` as bytes; suffixes K, M, G are powers of 1024 (``KiB``, ``KB`` and lower case are the same).

    Raises UsageError for zero, negative, fractional bytes and anything else.
    """
    body = text.strip().upper().removesuffix("B").removesuffix("I")
    factor = _FACTORS.get(body[-1:] if body[-1:].isalpha() else "")
    digits = body.rstrip("KMG") if factor != 1 else body
    if factor is None or not digits.isascii() or not digits.isdigit():
        raise UsageError(
            f"{what} {show(text)} is not a size in bytes.", hint="write a whole number with K, M or G, such as 512M."
        )
    value = int(digits) * factor
    if value <= 0:
        raise UsageError(f"{what} must be more than zero, not {show(text)}.")
    return value


def parse_duration(text: str, *, what: str) -> float:
    """``1.5s``, ``200ms``, ``2m``, ``1h`` or plain seconds, as seconds; more than zero and at most a year."""
    body = text.strip()
    digits = body.rstrip("abcdefghijklmnopqrstuvwxyz")
    factor = _SECONDS.get(body[len(digits) :])
    plain = digits.replace(".", "", 1)
    if factor is None or not plain.isascii() or not plain.isdigit():
        raise UsageError(f"{what} {show(text)} is not a duration.", hint="write 30s, 1.5s, 200ms, 5m or 1h.")
    seconds = float(digits) * factor
    if not 0 < seconds <= 366 * 86400:
        raise UsageError(f"{what} must be more than zero and at most a year, not {show(text)}.")
    return seconds


def format_bytes(count: int) -> str:
    """A size for people: the largest binary unit that keeps it readable."""
    for unit, factor in (("GiB", GIB), ("MiB", MIB), ("KiB", 1024)):
        if count >= factor:
            value = count / factor
            return f"{value:.0f} {unit}" if value >= 10 or value == int(value) else f"{value:.1f} {unit}"
    return f"{count} B"


def show(text: str | bytes, *, limit: int = 80) -> str:
    """Foreign text, quoted, cut and with every control character escaped: safe on a terminal and in a log."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "backslashreplace")
    cut = text if len(text) <= limit else text[:limit] + "…"
    return '"' + escape(cut.replace("\\", "\\\\").replace('"', '\\"')).replace("\t", "\\t") + '"'


def escape(text: str) -> str:
    """Replaces what a terminal would obey (C0, DEL, C1, line and paragraph separators, bidi controls) by escapes."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if _inert(c) else _escaped(c) for c in text)


def _inert(char: str) -> bool:
    return char == "\t" or char.isprintable()


def _escaped(char: str) -> str:
    code = ord(char)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
