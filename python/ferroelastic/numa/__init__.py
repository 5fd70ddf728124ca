"""Binds workers to the CPUs near their GPUs. Mirrors ``torch.numa``."""

from ferroelastic.numa.binding import AffinityMode, NumaOptions

__all__ = ["AffinityMode", "NumaOptions"]
