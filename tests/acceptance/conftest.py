"""Fixtures of the acceptance tests."""

from tests.support.harness import launch, zoo

__all__ = ["launch", "zoo"]
