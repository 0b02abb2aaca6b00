"""The unit tier: no root, no randomness between runs, no deadline that a busy machine could miss."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("steady", derandomize=True, deadline=None)
settings.load_profile("steady")
