"""A training whose native extension reads address 0 in rank 1."""

import ctypes
import faulthandler
import os
import time


def load_weights(address: int) -> bytes:
    """Read a buffer of the extension."""
    return ctypes.string_at(address)


faulthandler.enable()
if os.environ["RANK"] == "1":
    load_weights(0)
time.sleep(60)
