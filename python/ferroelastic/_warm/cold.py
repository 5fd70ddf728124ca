"""The reason of a cold start."""

from __future__ import annotations

__all__ = ["ColdError"]


class ColdError(Exception):
    """Workers cannot be warm.

    Args:
        reason: the reason, as a fragment of a sentence.
        is_logged: whether the engine has already logged the reason.
    """

    def __init__(self, reason: str, *, is_logged: bool = False) -> None:
        super().__init__(reason)
        self.is_logged = is_logged
