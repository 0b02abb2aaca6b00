"""The instance's own log: what was refused and what was reclaimed, one JSON object a line, bounded.

structlog takes 0.1 s to import, so this module is loaded only when there is something to write.
"""

from __future__ import annotations

import os

import structlog

from sandbox.config import Config

MAX_BYTES = 1 << 20


def record(config: Config, event: str, **fields: object) -> None:
    """Appends one event to ``log/events.jsonl`` of the state directory; the previous file is kept at 1 MiB."""
    folder = f"{config.state_dir}/log"
    os.makedirs(folder, mode=0o700, exist_ok=True)
    path = f"{folder}/events.jsonl"
    if os.path.exists(path) and os.path.getsize(path) > MAX_BYTES:
        os.rename(path, f"{path}.1")
    with open(path, "a", encoding="utf-8") as file:
        log = structlog.wrap_logger(
            structlog.WriteLogger(file),
            processors=[
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.processors.JSONRenderer(sort_keys=True),
            ],
        )
        log.info(event, **fields)
