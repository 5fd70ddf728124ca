"""Ids."""

import uuid

from ferroelastic.utils._ids import random_uuid


def test_a_random_uuid_is_one() -> None:
    texts = [random_uuid() for _ in range(1000)]
    assert len(set(texts)) == len(texts)
    for text in texts:
        parsed = uuid.UUID(text)
        assert (str(parsed), parsed.version, parsed.variant) == (text, 4, uuid.RFC_4122)
