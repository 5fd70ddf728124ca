"""What unit tests share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.unit.native_nodes import Nodes

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    made = Nodes()
    yield made
    made.close()
