"""A launch that starts nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


class Launch:
    """Stands in for ``elastic_launch``: keeps what it was called with and ends as the test says."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, tuple[Any, ...]]] = []
        self.error: BaseException | None = None

    def __call__(self, config: Any, entrypoint: Any) -> Callable[..., None]:
        def launch(*args: Any) -> None:
            self.calls.append((config, entrypoint, args))
            if self.error is not None:
                raise self.error

        return launch
