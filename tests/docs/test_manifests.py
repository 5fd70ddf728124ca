"""The manifests in the recipes satisfy the published schemas, and their parts fit."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from tests.docs.pages import captioned, ferrorun_arguments

from ferroelastic.run import get_args_parser

_SCHEMAS = [json.loads(path.read_text()) for path in Path(__file__).with_name("schemas").glob("*.json")]
_REGISTRY = Registry().with_resources(
    [(schema["$id"], Resource.from_contents(schema)) for schema in _SCHEMAS if "$id" in schema]
)
_KUBERNETES = "https://kubernetes.io/api/_definitions.json#/$defs/io.k8s.api"
_KINDS = {
    "Service": ("v1", f"{_KUBERNETES}.core.v1.Service"),
    "Job": ("batch/v1", f"{_KUBERNETES}.batch.v1.Job"),
    "JobSet": ("jobset.x-k8s.io/v1alpha2", "https://jobset.sigs.k8s.io/jobset.json#/$defs/JobSet"),
    "TrainingRuntime": (
        "trainer.kubeflow.org/v1alpha1",
        "https://trainer.kubeflow.org/trainer.json#/$defs/TrainingRuntime",
    ),
    "TrainJob": ("trainer.kubeflow.org/v1alpha1", "https://trainer.kubeflow.org/trainer.json#/$defs/TrainJob"),
}
_GRACE_S = 30
_ENUMERATED = {
    "completionMode": {"Indexed", "NonIndexed"},
    "restartPolicy": {"Always", "Never", "OnFailure"},
    "action": {"Ignore", "FailJob", "FailIndex", "Count", "FailJobSet", "Restart", "RestartAllContainers"},
    "operator": {"In", "NotIn"},
    "onJobFailureReasons": {"PodFailurePolicy"},
    "medium": {"", "Memory"},
}
"""Values that the API server checks and the schemas do not."""


def objects(caption: str) -> dict[str, Any]:
    return {one["kind"]: one for one in yaml.safe_load_all(captioned(caption).text)}


def faults(value: Any, schema: str) -> list[str]:
    """Where a value is not as a schema says."""
    validator = Draft202012Validator({"$ref": schema}, registry=_REGISTRY)
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)]


def job_of(caption: str) -> Any:
    """The specification of the Job that makes the pods."""
    found = objects(caption)
    if "Job" in found:
        return found["Job"]["spec"]
    jobs = found["JobSet"]["spec"] if "JobSet" in found else found["TrainingRuntime"]["spec"]["template"]["spec"]
    (job,) = jobs["replicatedJobs"]
    return job["template"]["spec"]


def container_of(job: Any) -> Any:
    (container,) = job["template"]["spec"]["containers"]
    return container


@pytest.mark.parametrize("caption", ["train.yaml", "jobset.yaml", "trainjob.yaml"])
def test_a_manifest_satisfies_the_schemas(caption: str) -> None:
    for kind, one in objects(caption).items():
        version, schema = _KINDS[kind]
        assert one["apiVersion"] == version
        assert faults(one, schema) == []


def test_the_task_for_skypilot_satisfies_the_schema() -> None:
    (schema,) = (one for one in _SCHEMAS if "$id" not in one)
    task = yaml.safe_load(captioned("train.sky.yaml").text)
    assert list(Draft202012Validator(schema).iter_errors(task)) == []
    assert list(Draft202012Validator(schema).iter_errors({**task, "nodes": 2})) != []


def test_the_task_for_dstack_is_one() -> None:
    task = yaml.safe_load(captioned("train.dstack.yml").text)
    assert task.keys() == {"type", "name", "nodes", "python", "repos", "commands", "resources"}
    models = pytest.importorskip("dstack._internal.core.models.configurations")
    assert models.parse_run_configuration(task).nodes == 2


@pytest.mark.parametrize(
    ("kind", "caption", "path"),
    [
        ("Job", "train.yaml", ("spec", "template", "spec", "containers", 0, "livenessProbe", "httpGet")),
        ("JobSet", "jobset.yaml", ("spec", "failurePolicy")),
        ("JobSet", "jobset.yaml", ("spec", "replicatedJobs", 0, "template", "spec", "podFailurePolicy")),
        ("TrainingRuntime", "trainjob.yaml", ("spec", "template", "spec", "replicatedJobs", 0)),
        ("TrainJob", "trainjob.yaml", ("spec", "trainer")),
    ],
)
def test_the_check_finds_fields_that_do_not_exist(kind: str, caption: str, path: tuple[str | int, ...]) -> None:
    one = objects(caption)[kind]
    inner = one
    for key in path:
        inner = inner[key]
    inner["unknown"] = 1
    found = faults(one, _KINDS[kind][1])
    assert any("'unknown' was unexpected" in fault for fault in found), found


@pytest.mark.parametrize("caption", ["train.yaml", "jobset.yaml", "trainjob.yaml", "in-place.yaml"])
def test_enumerated_values_exist(caption: str) -> None:
    def walk(value: Any) -> None:
        if isinstance(value, list):
            for one in value:
                walk(one)
        elif isinstance(value, dict):
            for key, one in value.items():
                if key in _ENUMERATED:
                    assert set(one if isinstance(one, list) else [one]) <= _ENUMERATED[key]
                walk(one)

    for one in yaml.safe_load_all(captioned(caption).text):
        walk(one)


@pytest.mark.parametrize("caption", ["train.yaml", "jobset.yaml", "trainjob.yaml"])
def test_a_pod_has_probes_and_time_to_end(caption: str) -> None:
    job = job_of(caption)
    pod, container = job["template"]["spec"], container_of(job)
    assert pod["terminationGracePeriodSeconds"] > _GRACE_S
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy does not allow another one
    assert job["backoffLimit"] == 0
    assert {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]} in job["podFailurePolicy"]["rules"]
    for rule in job["podFailurePolicy"]["rules"]:
        assert rule.get("onExitCodes", {}).get("containerName", container["name"]) == container["name"]
    ports = {one["name"]: one["containerPort"] for one in container["ports"]}
    environment = {one["name"]: one["value"] for one in container["env"]}
    assert environment["TORCHELASTIC_HEALTH_CHECK_PORT"] == str(ports["health"])
    assert environment["TORCHELASTIC_HEALTH_CHECK_HOST"] == "0.0.0.0"
    assert container["livenessProbe"]["httpGet"] == {"path": "/livez", "port": "health"}
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "health"}
    assert {one["name"] for one in container["volumeMounts"]} == {one["name"] for one in pod["volumes"]}


@pytest.mark.parametrize(
    ("caption", "host"), [("train.yaml", "train-0.train"), ("jobset.yaml", "train-node-0-0.train")]
)
def test_the_command_fits_the_pods(caption: str, host: str) -> None:
    job = job_of(caption)
    container = container_of(job)
    (arguments,) = ferrorun_arguments(container["command"][-1])
    parsed = get_args_parser().parse_args(arguments)
    ports = {one["name"]: one["containerPort"] for one in container["ports"]}
    assert parsed.rdzv_endpoint == f"{host}:{ports['rendezvous']}"
    assert parsed.nnodes == str(job["completions"]) == str(job["parallelism"])
    assert parsed.nproc_per_node == str(container["resources"]["limits"]["nvidia.com/gpu"])
    subprocess.run(["sh", "-n", "-c", container["command"][-1]], check=True)


def test_the_service_names_the_pods() -> None:
    found = objects("train.yaml")
    service, job = found["Service"], found["Job"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert {one["port"] for one in service["spec"]["ports"]} <= {
        one["containerPort"] for one in container_of(job["spec"])["ports"]
    }


def test_the_names_of_the_jobset_are_those_of_its_endpoint() -> None:
    jobset = objects("jobset.yaml")["JobSet"]
    (job,) = jobset["spec"]["replicatedJobs"]
    name = jobset["metadata"]["name"]
    assert f"{name}-{job['name']}-0-0.{name}:29400" in container_of(job_of("jobset.yaml"))["command"][-1]


def test_the_trainjob_uses_its_runtime() -> None:
    found = objects("trainjob.yaml")
    runtime, trainjob = found["TrainingRuntime"], found["TrainJob"]
    (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert trainjob["spec"]["runtimeRef"] == {"kind": "TrainingRuntime", "name": runtime["metadata"]["name"]}
    assert job["name"] == container_of(job_of("trainjob.yaml"))["name"] == "node"
    assert job["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    trainer = trainjob["spec"]["trainer"]
    assert trainer["numProcPerNode"] == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    assert trainer["command"][0] == "ferrorun"
    get_args_parser().parse_args(trainer["command"][1:])


@pytest.mark.parametrize("caption", ["train.yaml", "jobset.yaml"])
def test_the_rules_for_restarts_in_place_fit_a_pod(caption: str) -> None:
    job = job_of(caption)
    (rules,) = yaml.safe_load(captioned("in-place.yaml").text)["containers"]
    container = container_of(job)
    assert rules["name"] == container["name"]
    container.update(rules)
    assert faults(job, f"{_KUBERNETES}.batch.v1.JobSpec") == []
