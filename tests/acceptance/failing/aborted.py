"""A training whose native extension has a failed assertion in rank 1: the C library prints a message and aborts."""

import ctypes
import os
import time

if os.environ["RANK"] == "1":
    ctypes.CDLL(None).__assert_fail(b"ring->head < ring->size", b"ring.c", 41, b"push")
time.sleep(60)
