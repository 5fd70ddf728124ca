"""A training that ends with an exit code of its own in rank 1."""

import os
import sys
import time

if os.environ["RANK"] == "1":
    sys.exit(3)
time.sleep(60)
