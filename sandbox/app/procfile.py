"""The Procfile, read strictly: a line that is not understood is an error with its file and line, never skipped."""

from __future__ import annotations

from typing import NoReturn

from sandbox import names
from sandbox.errors import ProcfileError
from sandbox.units import show

# A Procfile is a handful of lines; these bounds keep a hostile one from costing anything.
MAX_BYTES = 256 * 1024
MAX_LINE = 32 * 1024


def parse(data: bytes, path: str) -> dict[str, str]:
    """Process types and their commands, in file order; ``path`` is what messages call the file.

    Empty lines and lines that begin with ``#`` are skipped, as at Heroku. Raises ProcfileError with ``file:line``.
    """
    if len(data) > MAX_BYTES:
        _refuse(path, _long_line(data), f"the file has {len(data)} bytes, at most {MAX_BYTES} are read")
    types: dict[str, str] = {}
    first_seen: dict[str, int] = {}
    for number, raw in enumerate(data.split(b"\n"), 1):
        if len(raw) > MAX_LINE:
            _refuse(path, number, f"the line has {len(raw)} bytes, at most {MAX_LINE} are read")
        if b"\0" in raw:
            _refuse(path, number, "the line holds a NUL byte")
        try:
            line = raw.removesuffix(b"\r").decode("utf-8").strip()
        except UnicodeDecodeError:
            _refuse(path, number, "the line is not UTF-8")
        if number == 1:
            line = line.removeprefix("\ufeff")
        if not line or line.startswith("#"):
            continue
        name, colon, command = line.partition(":")
        name, command = name.rstrip(), command.strip()
        if not colon:
            _refuse(path, number, f"{show(line)} has no colon", hint="write <process type>: <command>")
        if not names.is_process_type(name):
            what = "contains a space" if " " in name else "is not 1 to 128 of A-Z a-z 0-9 _ -"
            fixed = "-".join(name.split()) if " " in name and names.is_process_type("-".join(name.split())) else "web"
            _refuse(path, number, f"process type {show(name)} {what}", hint=f"write {show(f'{fixed}: {command}')}")
        if not command:
            _refuse(path, number, f"process type {show(name)} has no command", hint=f"write {name}: <command>")
        if name in types:
            _refuse(path, number, f"process type {show(name)} stands in line {first_seen[name]} already")
        types[name], first_seen[name] = command, number
    if not types:
        _refuse(path, 1, "it names no process type", hint="write web: <command>, or remove the file")
    return types


def _long_line(data: bytes) -> int:
    """The first line that is too long, else 1."""
    return next((n for n, line in enumerate(data.split(b"\n"), 1) if len(line) > MAX_LINE), 1)


def _refuse(path: str, line: int, reason: str, *, hint: str | None = None) -> NoReturn:
    raise ProcfileError(f"{path}:{line}: {reason}; nothing was started.", hint=hint)
