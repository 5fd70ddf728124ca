"""A training without a fault. Its rank 1 writes its process id into a file."""

import os
import time
from pathlib import Path

if os.environ["RANK"] == "1":
    temporary = Path(os.environ["DIR"], "pid~")
    temporary.write_text(str(os.getpid()))
    temporary.rename(temporary.with_name("pid"))
time.sleep(60)
