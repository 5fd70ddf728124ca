"""A training whose library ends the process of rank 1 without an exception."""

import os
import sys
import time

if os.environ["RANK"] == "1":
    sys.stderr.write("license server: no seat left, giving up\n")
    sys.stderr.flush()
    os._exit(41)
time.sleep(60)
