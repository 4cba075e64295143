"""What unit tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.small_disk import small_disk_at


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 1 MiB. Skips where this user may not mount one."""
    with small_disk_at(tmp_path / "small_disk", mebibytes=1) as folder:
        yield folder
