"""Mirror of ``torch.distributed.elastic.utils``; no intended differences."""

from ferroelastic.utils.api import get_env_variable_or_raise, get_socket_with_port, macros

__all__ = ["get_env_variable_or_raise", "get_socket_with_port", "macros"]
