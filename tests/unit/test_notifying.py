"""Capabilities of rendezvous handlers: ours, those written for torch, and those that declare only some."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
from tests.support.fake_agent import Handler

from ferroelastic.rendezvous._native import NativeRendezvous
from ferroelastic.rendezvous._notifying import may_grow, notifier_of, renews_store


class Foreign:
    """Written for torch: derived from no class of this package."""


class Wrapper:
    """Hands everything on to another handler."""

    def __init__(self, handler: object) -> None:
        self._handler = handler

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handler, name)


class Partial(Foreign):
    renews_store = True
    may_grow = False


NATIVE = NativeRendezvous.__new__(NativeRendezvous)


@pytest.mark.parametrize("handler", [NATIVE, Wrapper(NATIVE)])
def test_ours_has_all(handler: object) -> None:
    assert notifier_of(handler) is handler
    assert renews_store(handler)
    assert not may_grow(handler)


@pytest.mark.parametrize("handler", [Foreign(), Wrapper(Foreign()), mock.Mock()])
def test_one_written_for_torch_has_none(handler: object) -> None:
    assert notifier_of(handler) is None
    assert not renews_store(handler)
    assert may_grow(handler)


def test_each_can_be_declared_alone() -> None:
    assert notifier_of(Partial()) is None
    assert renews_store(Partial())
    assert not may_grow(Partial())
    assert renews_store(Handler())
    assert may_grow(Handler())
