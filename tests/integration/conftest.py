"""Fixtures of the integration tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.support.health_probes import serve
from tests.support.native_nodes import Nodes

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["serve"]


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    made = Nodes()
    yield made
    made.close()
