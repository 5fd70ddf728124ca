"""Workers that run a command. Mirrors ``torch.distributed.elastic.multiprocessing.subprocess_handler``."""

from ferroelastic.multiprocessing.subprocess_handler.handlers import get_subprocess_handler
from ferroelastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

__all__ = ["SubprocessHandler", "get_subprocess_handler"]
