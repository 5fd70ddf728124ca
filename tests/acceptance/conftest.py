"""Fixtures of the acceptance tests."""

from tests.faults.harness import launch, zoo

__all__ = ["launch", "zoo"]
