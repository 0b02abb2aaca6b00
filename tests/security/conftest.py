"""What every file here shares: a cell that a failed test leaves behind must not fail the next ones."""

from __future__ import annotations

import pytest

from tests.security import cell


@pytest.fixture(autouse=True)
def _no_cell_is_left():
    before = len(cell.OPEN)
    yield
    for left in cell.OPEN[before:]:
        left.close()
