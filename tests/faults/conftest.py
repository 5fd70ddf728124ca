"""Fixtures of the fault tests."""

from tests.faults.harness import launch, zoo

__all__ = ["launch", "zoo"]
