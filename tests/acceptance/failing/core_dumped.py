"""A training that allows core dumps, and whose native extension writes to address 0 in rank 1."""

import ctypes
import os
import resource
import time

_, most = resource.getrlimit(resource.RLIMIT_CORE)
resource.setrlimit(resource.RLIMIT_CORE, (most, most))
if os.environ["RANK"] == "1":
    ctypes.memset(0, 1, 8)
time.sleep(60)
