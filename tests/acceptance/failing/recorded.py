"""Runs another script with torch's decorator ``@record``, which writes an exception into the error file."""

import runpy
import sys

from torch.distributed.elastic.multiprocessing.errors import record


@record
def main() -> None:
    """Run the script as the main module."""
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


main()
