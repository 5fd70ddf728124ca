"""A cell of a notebook that trains with accelerate's ``notebook_launcher``."""

from __future__ import annotations

import os

from accelerate import notebook_launcher


def train() -> None:
    """Train in a forked worker."""
    from with_accelerate import main

    main()


if __name__ == "__main__":
    if os.environ["PROGRAMS_AGENT"] == "ferroelastic":
        import ferroelastic

        ferroelastic.install()
    notebook_launcher(
        train,
        num_processes=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=int(os.environ["PROGRAMS_RESTARTS"]),
    )
