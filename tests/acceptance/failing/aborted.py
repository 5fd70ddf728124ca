"""A training whose native extension frees a pointer twice in rank 1: the C library prints a message and aborts."""

import ctypes
import os
import time

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]

if os.environ["RANK"] == "1":
    buffer = libc.malloc(24)
    libc.free(buffer + 8)
time.sleep(60)
