"""Warm workers: interpreters that have imported the workers' modules in advance.

:mod:`ferroelastic._warm.pool` is the agent's side. :mod:`ferroelastic._warm.target` tells which workers can be warm. ``zygote.py`` runs in
the zygote and in its children, where ``hook`` starts it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ferroelastic._compat import newer

if TYPE_CHECKING:
    from collections.abc import Callable

    from ferroelastic._warm.pool import WarmWorkers

__all__ = ["warm_workers_of"]


def warm_workers_of(spec: Any, on_refusal: Callable[[str], object]) -> WarmWorkers | None:
    """Return the warm workers that a specification asks for; ``None`` if it asks for none, or is of torch's class.

    Args:
        spec: specification of the workers.
        on_refusal: called with the reason if workers start cold.
    """
    children, preload = newer(spec, "warm_workers", 0), newer(spec, "preload", False)
    if not children and not preload:
        return None
    from ferroelastic._warm.pool import WarmWorkers

    return WarmWorkers(children=children, imports=spec.warm_imports, preload=preload, on_refusal=on_refusal)
