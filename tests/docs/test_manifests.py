"""The files in the recipes are well-formed: batch scripts, manifests, an image, a unit."""

from __future__ import annotations

import configparser
import json
import re
import subprocess
from typing import Any

import pytest
import yaml
from tests.docs.pages import ROOT, Block, blocks, ferrorun_arguments, pages

from ferroelastic.run import get_args_parser

_FILES = {block.caption: block for page in pages() for block in blocks(page) if block.caption}
_GRACE_S = 30

_METADATA = {"name": str}
_PORT = {"name": str, "port?": int, "containerPort?": int}
_PROBE = {
    "httpGet": {"path": str, "port": str},
    "initialDelaySeconds?": int,
    "periodSeconds?": int,
    "failureThreshold?": int,
}
_CONTAINER = {
    "name": str,
    "image": str,
    "command": [str],
    "env": [{"name": str, "value": str}],
    "ports": [_PORT],
    "livenessProbe": _PROBE,
    "readinessProbe": _PROBE,
    "resources": {"limits": {"nvidia.com/gpu": int}},
    "volumeMounts": [{"name": str, "mountPath": str}],
}
_POD = {
    "subdomain": str,
    "restartPolicy": str,
    "terminationGracePeriodSeconds": int,
    "containers": [_CONTAINER],
    "volumes": [{"name": str, "emptyDir": {"medium": str, "sizeLimit": str}}],
}
_KINDS: dict[str, Any] = {
    "Service": {
        "apiVersion": str,
        "kind": str,
        "metadata": _METADATA,
        "spec": {"clusterIP": str, "publishNotReadyAddresses": bool, "selector": {"job-name": str}, "ports": [_PORT]},
    },
    "Job": {
        "apiVersion": str,
        "kind": str,
        "metadata": _METADATA,
        "spec": {
            "completions": int,
            "parallelism": int,
            "completionMode": str,
            "backoffLimit": int,
            "template": {"spec": _POD},
        },
    },
}
"""The fields of the Kubernetes API that the recipe uses, with their types. ``?`` marks those that may be left out."""


def faults(value: Any, schema: Any, path: str = "") -> list[str]:
    """Where a value is not as a schema says."""
    if isinstance(schema, type):
        return [] if type(value) is schema else [f"{path}: {value!r} is no {schema.__name__}"]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{path}: {value!r} is no list"]
        return [fault for index, one in enumerate(value) for fault in faults(one, schema[0], f"{path}[{index}]")]
    if not isinstance(value, dict):
        return [f"{path}: {value!r} is no mapping"]
    known = {key.removesuffix("?"): one for key, one in schema.items()}
    found = [f"{path}.{key} is not known" for key in value.keys() - known.keys()]
    found += [f"{path}.{key} is missing" for key in schema if not key.endswith("?") and key not in value]
    return found + [
        fault for key in value.keys() & known.keys() for fault in faults(value[key], known[key], f"{path}.{key}")
    ]


def manifests() -> dict[str, Any]:
    return {one["kind"]: one for one in yaml.safe_load_all(_FILES["train.yaml"].text)}


@pytest.mark.parametrize("kind", _KINDS)
def test_a_manifest_has_the_fields_of_its_kind(kind: str) -> None:
    assert faults(manifests()[kind], _KINDS[kind]) == []


def test_the_check_of_manifests_finds_faults() -> None:
    schema = {"a": int, "b?": [str]}
    assert faults({}, schema) == [".a is missing"]
    assert faults({"a": 1, "c": 2}, schema) == [".c is not known"]
    assert faults({"a": 1, "b": [1]}, schema) == [".b[0]: 1 is no str"]
    assert faults({"a": "1"}, schema) == [".a: '1' is no int"]


def test_the_parts_of_the_manifests_fit() -> None:
    service, job = manifests()["Service"], manifests()["Job"]
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (arguments,) = ferrorun_arguments(container["command"][-1])
    parsed = get_args_parser().parse_args(arguments)
    name, port = job["metadata"]["name"], service["spec"]["ports"][0]["port"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert parsed.rdzv_endpoint == f"{name}-0.{service['metadata']['name']}:{port}"
    assert parsed.nnodes == str(job["spec"]["completions"]) == str(job["spec"]["parallelism"])
    assert parsed.nproc_per_node == str(container["resources"]["limits"]["nvidia.com/gpu"])
    assert pod["terminationGracePeriodSeconds"] > _GRACE_S
    ports = {one["name"]: one["containerPort"] for one in container["ports"]}
    environment = {one["name"]: one["value"] for one in container["env"]}
    assert environment["TORCHELASTIC_HEALTH_CHECK_PORT"] == str(ports["health"])
    assert {container[probe]["httpGet"]["port"] for probe in ("livenessProbe", "readinessProbe")} == {"health"}
    assert ports["rendezvous"] == port
    assert {one["name"] for one in container["volumeMounts"]} == {one["name"] for one in pod["volumes"]}
    subprocess.run(["sh", "-n", "-c", container["command"][-1]], check=True)


@pytest.mark.parametrize("caption", ["train.sbatch", "explicit.sbatch", "elastic.sbatch"])
def test_a_batch_script_is_well_formed(caption: str) -> None:
    block: Block = _FILES[caption]
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
    lines = [line.split(maxsplit=1) for line in _FILES["Dockerfile"].text.splitlines()]
    assert {word for word, _ in lines} <= {"FROM", "RUN", "WORKDIR", "COPY", "ENTRYPOINT", "CMD"}
    values = dict(reversed(lines))
    assert json.loads(values["ENTRYPOINT"]) == ["ferrorun"]
    parsed = get_args_parser().parse_args(json.loads(values["CMD"]))
    assert parsed.training_script in values["COPY"]


def test_the_unit_is_well_formed() -> None:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(_FILES["train.service"].text)
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
