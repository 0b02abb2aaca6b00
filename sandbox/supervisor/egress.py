"""What somebody wrote about a dyno's egress, with the operator's own lists, as a value of the policy."""

from __future__ import annotations

from collections.abc import Iterable

from sandbox.config import Config
from sandbox.errors import UsageError
from sandbox.policy import egress
from sandbox.policy.egress import Egress
from sandbox.units import show

_FILE_BYTES = 4 << 20


def wish(config: Config, text: str, *, smtp: bool = False) -> Egress:
    """``public``, ``none``, ``allow:ENTRY,ENTRY`` or ``allow:@FILE``, as the command line has it."""
    mode, colon, listed = text.partition(":")
    return make(config, mode, _entries(listed) if colon else (), smtp=smtp)


def make(config: Config, mode: str, entries: Iterable[str], *, smtp: bool, where: str = "--egress") -> Egress:
    """The egress, checked against what is always denied and what the operator denies and permits."""
    deny, permit = (
        [egress.parse_network(text, where=f"the host configuration's {key}") for text in texts]
        for key, texts in (("deny", config.deny), ("permit", config.permit))
    )
    return egress.make(mode, entries, smtp=smtp, deny=deny, permit=permit, where=where)


def _entries(listed: str) -> list[str]:
    """A list of the command line, or of the file after an @, one entry a line."""
    if not listed.startswith("@"):
        return egress.split(listed) if listed else []
    try:
        with open(listed[1:], encoding="utf-8") as file:
            lines = (line.partition("#")[0].strip() for line in file.read(_FILE_BYTES).splitlines())
            return [line for line in lines if line]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UsageError(f"--egress {show(listed)} cannot be read: {reason}; nothing was started.") from error
