"""Fixtures of the integration tests."""

from tests.integration.probes import serve

__all__ = ["serve"]
