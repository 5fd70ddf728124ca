"""The other files in the recipes are well-formed: batch scripts, an image, a unit; and so is the workflow of releases."""

from __future__ import annotations

import configparser
import json
import re
import subprocess

import pytest
import yaml
from tests.docs.pages import ROOT, captioned, ferrorun_arguments

from ferroelastic.run import get_args_parser

_GRACE_S = 30


@pytest.mark.parametrize("caption", ["train.sbatch", "explicit.sbatch", "elastic.sbatch"])
def test_a_batch_script_is_well_formed(caption: str) -> None:
    block = captioned(caption)
    subprocess.run(["bash", "-n", "-c", block.text], check=True)
    values = {
        "job-name": r"\w+",
        "nodes": r"\d+(-\d+)?",
        "ntasks-per-node": "1",
        "gpus-per-node": r"\d+",
        "cpus-per-task": r"\d+",
        "time": r"\d+:\d\d:\d\d",
        "no-kill": "",
    }
    options = re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", block.text, re.MULTILINE)
    assert len(options) == block.text.count("#SBATCH")
    for name, value in options:
        assert re.fullmatch(values[name], value), (name, value)
    (arguments,) = ferrorun_arguments(block.text)
    parsed = get_args_parser().parse_args(arguments)
    # Otherwise Slurm gives the number of workers.
    assert "nproc_per_node" not in parsed.given or parsed.nproc_per_node == dict(options)["gpus-per-node"]


def test_the_image_is_well_formed() -> None:
    lines = [line.split(maxsplit=1) for line in captioned("Dockerfile").text.splitlines()]
    assert {word for word, _ in lines} <= {"FROM", "RUN", "WORKDIR", "COPY", "ENTRYPOINT", "CMD"}
    values = dict(reversed(lines))
    assert json.loads(values["ENTRYPOINT"]) == ["ferrorun"]
    parsed = get_args_parser().parse_args(json.loads(values["CMD"]))
    assert parsed.training_script in values["COPY"]


def test_the_unit_is_well_formed() -> None:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(captioned("train.service").text)
    assert set(unit["Service"]) == {
        *("WorkingDirectory", "ExecStart", "Environment", "KillMode", "TimeoutStopSec", "Delegate", "Restart")
    }
    assert int(unit["Service"]["TimeoutStopSec"]) > _GRACE_S
    assert unit["Service"]["KillMode"] in ("control-group", "mixed", "process", "none")


def test_the_release_workflow_is_pinned() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert {one["machine"] for one in workflow["jobs"]["wheel"]["strategy"]["matrix"]["include"]} == {
        "x86_64",
        "aarch64",
    }
    for step in steps:
        assert ("uses" in step) != ("run" in step)
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+\.\d+\.\d+", step["uses"])
        else:
            subprocess.run(["bash", "-n", "-c", re.sub(r"\$\{\{.*?\}\}", "1", step["run"])], check=True)
