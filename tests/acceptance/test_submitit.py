"""A job of submitit that calls torch's launcher has the agent of this package. Other programs are in ``tests/programs``."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from tests.support.harness import FERRORUN, ROOT
from tests.support.waiting import LONG_S

if TYPE_CHECKING:
    from tests.support.harness import Launcher

_WORKERS = ROOT / "tests" / "programs" / "workers"


def test_a_killed_rank_of_a_submitit_job_comes_back(launch: Launcher) -> None:
    env = {
        "PROGRAMS_TASK": "killed",
        "PROGRAMS_FOLDER": str(launch.folder),
        "PROGRAMS_RESTARTS": "1",
    }
    job = launch.start(*FERRORUN, "--exec", sys.executable, str(_WORKERS / "with_submitit.py"), env=env)
    assert job.end(timeout_s=3 * LONG_S) == 0, job.story
    assert {path.name for path in launch.folder.glob("done.*")} == {"done.0.1", "done.1.1"}
    starts = [json.loads(path.read_text()) for path in launch.folder.glob("start.*")]
    assert [start["agent"] for start in starts] == ["ferroelastic"] * 4
