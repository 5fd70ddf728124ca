"""A training that writes its own error file. The disk is full in the middle of the file."""

import os
import time

try:
    if os.environ["RANK"] == "1":
        raise RuntimeError("the loss is not finite")
    time.sleep(60)
except RuntimeError:
    with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w") as file:
        file.write('{"message": {"message": "RuntimeError: the loss is not finite", "extraInfo": {"py_call')
    raise
