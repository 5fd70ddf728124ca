"""The place of a node from the variables of each scheduler, as their documentation shows them."""

from __future__ import annotations

import logging
import os
import sys
from argparse import Namespace
from typing import TYPE_CHECKING, Any

import pytest

from ferroelastic import run
from ferroelastic._scheduler.placement import Incomplete, Placement, Surroundings, Taken, port_of_number
from ferroelastic._scheduler.take import END_VARIABLE, find
from ferroelastic._usage import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

SLURM_JOB = {
    "SLURM_JOB_ID": "65541",
    "SLURM_JOBID": "65541",
    "SLURM_JOB_NAME": "train",
    "SLURM_JOB_NODELIST": "tux[00-03]",
    "SLURM_JOB_NUM_NODES": "4",
    "SLURM_NODELIST": "tux[00-03]",
    "SLURM_NNODES": "4",
    "SLURM_NODEID": "0",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_TASKS_PER_NODE": "1(x4)",
    "SLURM_CPUS_ON_NODE": "64",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURMD_NODENAME": "tux00",
    "SLURM_SUBMIT_HOST": "login1",
}
"""Of the shell of a batch script, on the first node."""

SLURM_STEP = {
    **SLURM_JOB,
    "SLURM_STEP_ID": "0",
    "SLURM_STEPID": "0",
    "SLURM_STEP_NODELIST": "tux[01-02]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "1",
    "SLURMD_NODENAME": "tux02",
}
"""Of the second task of ``srun --nodes=2`` in that job."""

SKYPILOT = {
    "SKYPILOT_NODE_RANK": "0",
    "SKYPILOT_NODE_IPS": "10.0.0.5\n10.0.0.9",
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NUM_GPUS_PER_NODE": "4",
    "SKYPILOT_TASK_ID": "sky-2026-11-01-10-00-00-000000_train_1",
}

DSTACK = {
    "DSTACK_RUN_NAME": "train-distrib",
    "DSTACK_NODES_IPS": "10.1.0.2\n10.1.0.3",
    "DSTACK_MASTER_NODE_IP": "10.1.0.2",
    "DSTACK_NODE_RANK": "1",
    "DSTACK_NODES_NUM": "2",
    "DSTACK_GPUS_PER_NODE": "8",
    "DSTACK_GPUS_NUM": "16",
}

FLUX = {
    "FLUX_JOB_ID": "ƒ3ETxsR9H",
    "FLUX_JOB_NNODES": "3",
    "FLUX_JOB_SIZE": "3",
    "FLUX_TASK_RANK": "2",
    "FLUX_TASK_LOCAL_ID": "0",
    "FLUX_URI": "local:///run/flux/local",
}

KUBERNETES = {"JOB_COMPLETION_INDEX": "1"}
POD = {"hostname": "train-1", "fqdn": "train-1.workers.default.svc.cluster.local"}

OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_NODE_RANK": "0",
    "OMPI_UNIVERSE_SIZE": "4",
}


def look(
    environ: Mapping[str, str],
    *,
    nodes: int | None = None,
    hostname: str = "host",
    fqdn: str = "host",
    flux_hosts: str | OSError = "corona[171-173]",
) -> Placement | Incomplete | None:
    def hosts_of_flux() -> str:
        if isinstance(flux_hosts, OSError):
            raise flux_hosts
        return f"{flux_hosts}\n"

    given = None if nodes is None else Taken(nodes, "--nnodes")
    return find(environ, Surroundings(given, lambda: hostname, lambda: fqdn, hosts_of_flux))


def placed(environ: Mapping[str, str], **surroundings: Any) -> tuple[int, int, str, str, int | None]:
    """Nodes, rank, id, host and GPUs."""
    found = look(environ, **surroundings)
    assert isinstance(found, Placement), found
    gpus = None if found.gpus is None else found.gpus.value
    return found.nodes.value, found.rank.value, found.run_id.value, found.host.value, gpus


def incomplete(environ: Mapping[str, str], **surroundings: Any) -> str:
    """The reason."""
    found = look(environ, **surroundings)
    assert isinstance(found, Incomplete), found
    return found.reason


def refused(environ: Mapping[str, str], **surroundings: Any) -> str:
    with pytest.raises(UsageError) as raised:
        look(environ, **surroundings)
    return str(raised.value)


def without(environ: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


def test_no_scheduler_has_no_place() -> None:
    assert look({"PATH": "/bin", "HOSTNAME": "n1"}) is None


class TestSlurm:
    def test_a_task_takes_the_step_and_not_the_job(self) -> None:
        assert placed(SLURM_STEP) == (2, 1, "65541.0", "tux01", 8)

    def test_a_requeued_job_has_another_id(self) -> None:
        assert placed({**SLURM_STEP, "SLURM_RESTART_COUNT": "0"})[2] == "65541.0"
        assert placed({**SLURM_STEP, "SLURM_RESTART_COUNT": "2"})[2] == "65541.0.2"

    def test_the_end_of_the_job_is_taken(self) -> None:
        found = look({**SLURM_STEP, "SLURM_JOB_END_TIME": "1795900000"})
        assert found is not None
        assert found.end_s == Taken(1795900000, "SLURM_JOB_END_TIME")

    def test_steps_and_neighbouring_jobs_have_different_ports(self) -> None:
        ports = {port_of_number(job, step) for job in range(65541, 65741) for step in range(5)}
        assert len(ports) == 1000
        assert all(20000 <= port < 30000 for port in ports)
        assert len({port_of_number(1, step) for step in range(5000)}) == 5000

    @pytest.mark.parametrize(("reserved", "port"), [("12000-12001", 12000), ("12003", 12003), ("12005,12009", 12005)])
    def test_a_reserved_port_is_taken(self, reserved: str, port: int) -> None:
        found = look({**SLURM_STEP, "SLURM_STEP_RESV_PORTS": reserved})
        assert isinstance(found, Placement)
        assert found.port == Taken(port, "SLURM_STEP_RESV_PORTS")

    @pytest.mark.parametrize("step", [None, "4294967290", "4294967291"], ids=["no step", "salloc", "batch"])
    def test_a_shell_without_a_step_of_several_nodes_runs_alone(self, step: str | None) -> None:
        environ = SLURM_JOB if step is None else {**SLURM_JOB, "SLURM_STEP_ID": step}
        found = look(environ)
        assert isinstance(found, Incomplete)
        assert found.reason == (
            "job 65541 has 4 nodes (SLURM_JOB_NUM_NODES), but this process is not in a step of it (SLURM_STEP_ID)"
        )
        assert found.remedy == "run srun ferrorun for all nodes, or give --standalone"
        assert found.gpus == Taken(8, "SLURM_GPUS_ON_NODE")

    def test_a_batch_script_does_not_take_the_step_that_submitted_it(self) -> None:
        """It inherits ``SLURM_STEP_*`` of that step."""
        submitter = {name: value for name, value in SLURM_STEP.items() if name.startswith("SLURM_STEP")}
        here = {**SLURM_JOB, **submitter, "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
        assert incomplete(here).startswith(
            "job 65541 has 4 nodes (SLURM_JOB_NUM_NODES), but this process is not in a step"
        )
        assert incomplete({**here, "SLURM_JOB_NUM_NODES": "1"}) == ""

    def test_a_shell_of_a_job_of_one_node_has_nothing_to_report(self) -> None:
        assert incomplete({**SLURM_JOB, "SLURM_JOB_NUM_NODES": "1"}) == ""

    def test_a_login_node_has_no_gpus(self) -> None:
        found = look(without(SLURM_JOB, "SLURMD_NODENAME"))
        assert isinstance(found, Incomplete)
        assert found.gpus is None

    @pytest.mark.parametrize(
        ("changed", "text"),
        [
            (
                {"SLURM_STEP_TASKS_PER_NODE": "8(x2)"},
                "SLURM_STEP_TASKS_PER_NODE=8(x2) starts 8 agents on one node, but the agent of a node starts all its workers; run srun --ntasks-per-node=1",
            ),
            ({"SLURM_STEP_TASKS_PER_NODE": "1,2"}, "SLURM_STEP_TASKS_PER_NODE=1,2 starts 2 agents on one node"),
            ({"SLURM_STEP_TASKS_PER_NODE": "1(x"}, "SLURM_STEP_TASKS_PER_NODE='1(x' is not a list of numbers"),
            ({"SLURM_STEP_NODELIST": "tux[01-"}, "SLURM_STEP_NODELIST='tux[01-' is not a host list: "),
            (
                {"SLURM_STEP_NODELIST": "tux[01-03]"},
                "SLURM_STEP_NUM_NODES=2, but SLURM_STEP_NODELIST has 3 hosts; give --rdzv-endpoint",
            ),
            ({"SLURM_NODEID": "2"}, "SLURM_NODEID=2 is not a rank of 2 nodes (SLURM_STEP_NUM_NODES)"),
            ({"SLURM_NODEID": "x"}, "SLURM_NODEID='x' is not a whole number"),
            ({"SLURM_NODEID": "-1"}, "SLURM_NODEID='-1' is not a whole number"),
            ({"SLURM_JOB_ID": "a.b"}, "SLURM_JOB_ID='a.b' is not a whole number"),
            ({"SLURM_GPUS_ON_NODE": "a100:8"}, "SLURM_GPUS_ON_NODE='a100:8' is not a whole number"),
            ({"SLURM_STEP_RESV_PORTS": "12a"}, "SLURM_STEP_RESV_PORTS='12a' is not a list of ports"),
            (
                {"SLURMD_NODENAME": "tux01"},
                "SLURMD_NODENAME=tux01, but node 1 (SLURM_NODEID) of SLURM_STEP_NODELIST is tux02; run srun ferrorun in this job",
            ),
        ],
    )
    def test_an_invalid_value_is_refused_with_the_remedy(self, changed: dict[str, str], text: str) -> None:
        message = refused({**SLURM_STEP, **changed})
        assert message.startswith(text)
        assert message.endswith("or ignore the scheduler with --no-scheduler")

    def test_a_step_without_its_rank_says_which_variable_is_missing(self) -> None:
        reason = incomplete(without(SLURM_STEP, "SLURM_NODEID"))
        assert reason == "the variables of Slurm are incomplete: SLURM_NODEID not set"


class TestSkyPilot:
    def test_a_task_is_placed(self) -> None:
        assert placed(SKYPILOT) == (2, 0, SKYPILOT["SKYPILOT_TASK_ID"], "10.0.0.5", 4)

    def test_addresses_and_number_of_nodes_must_agree(self) -> None:
        message = refused({**SKYPILOT, "SKYPILOT_NUM_NODES": "3"})
        assert message.startswith("SKYPILOT_NUM_NODES=3, but SKYPILOT_NODE_IPS has 2 addresses")

    @pytest.mark.parametrize(
        "name", ["SKYPILOT_NODE_RANK", "SKYPILOT_NODE_IPS", "SKYPILOT_NUM_NODES", "SKYPILOT_TASK_ID"]
    )
    def test_a_missing_variable_is_named(self, name: str) -> None:
        reason = incomplete(without(SKYPILOT, name))
        assert reason == f"the variables of SkyPilot are incomplete: {name} not set"


class TestDstack:
    def test_a_task_is_placed(self) -> None:
        assert placed(DSTACK) == (2, 1, "train-distrib", "10.1.0.2", 8)

    def test_the_id_of_the_run_is_preferred_to_its_name(self) -> None:
        assert placed({**DSTACK, "DSTACK_RUN_ID": "b0a7"})[2] == "b0a7"

    def test_a_run_on_one_node_has_nothing_to_report(self) -> None:
        assert incomplete({**DSTACK, "DSTACK_NODES_NUM": "1", "DSTACK_MASTER_NODE_IP": ""}) == ""

    @pytest.mark.parametrize(
        "name", ["DSTACK_NODE_RANK", "DSTACK_NODES_NUM", "DSTACK_MASTER_NODE_IP", "DSTACK_RUN_NAME"]
    )
    def test_a_missing_variable_is_named(self, name: str) -> None:
        reason = incomplete(without(DSTACK, name))
        assert reason == f"the variables of dstack are incomplete: {name} not set"

    def test_a_rank_outside_of_the_nodes_is_refused(self) -> None:
        assert refused({**DSTACK, "DSTACK_NODE_RANK": "2"}).startswith("DSTACK_NODE_RANK=2 is not a rank of 2 nodes")


class TestFlux:
    def test_a_task_is_placed(self) -> None:
        assert placed(FLUX) == (3, 2, "ƒ3ETxsR9H", "corona171", None)

    def test_a_job_of_one_node_asks_for_no_hosts(self) -> None:
        environ = {**FLUX, "FLUX_JOB_NNODES": "1", "FLUX_JOB_SIZE": "1", "FLUX_TASK_RANK": "0"}
        assert incomplete(environ, flux_hosts=OSError("must not be called")) == ""

    def test_a_missing_command_is_reported(self) -> None:
        error = FileNotFoundError(2, "No such file or directory", "flux")
        assert incomplete(FLUX, flux_hosts=error).startswith("the first node is unknown: flux hostlist local: ")

    def test_several_tasks_of_a_node_are_refused(self) -> None:
        message = refused({**FLUX, "FLUX_JOB_SIZE": "6"})
        assert "run flux run --nodes=3 --ntasks=3" in message

    def test_another_number_of_hosts_is_refused(self) -> None:
        assert refused(FLUX, flux_hosts="n[1-2]").startswith("FLUX_JOB_NNODES=3, but flux hostlist local has 2 hosts")

    def test_a_missing_rank_is_named(self) -> None:
        assert "FLUX_TASK_RANK not set" in incomplete(without(FLUX, "FLUX_TASK_RANK"))


class TestKubernetes:
    def test_a_pod_with_a_service_is_placed(self) -> None:
        assert placed(KUBERNETES, nodes=2, **POD) == (
            *(2, 1, "train", "train-0.workers.default.svc.cluster.local"),
            None,
        )

    def test_without_nnodes_the_number_of_pods_is_missing(self) -> None:
        found = look(KUBERNETES)
        assert isinstance(found, Incomplete)
        assert found.remedy == "give --nnodes with the job's completions, or --standalone"

    def test_without_a_subdomain_the_service_is_missing(self) -> None:
        reason = incomplete(KUBERNETES, nodes=2, hostname="train-1", fqdn="train-1")
        assert "the pod 'train-1' has no subdomain" in reason

    def test_another_host_name_is_reported(self) -> None:
        reason = incomplete(KUBERNETES, nodes=2, hostname="node7", fqdn="node7.example.org")
        assert reason.startswith("the host name 'node7' does not end with -1 (JOB_COMPLETION_INDEX)")

    def test_an_index_outside_of_the_nodes_is_refused(self) -> None:
        assert refused({"JOB_COMPLETION_INDEX": "4"}, nodes=2, **POD).startswith(
            "JOB_COMPLETION_INDEX=4 is not a rank of 2 nodes (--nnodes)"
        )


class TestOpenMpi:
    def test_in_an_allocation_the_host_list_has_the_first_node(self) -> None:
        # On a remote node the step is the one of mpirun's daemons, which leaves out the node of mpirun.
        daemons = {**SLURM_STEP, "SLURM_STEP_NODELIST": "tux[01-03]", "SLURM_STEP_NUM_NODES": "3", "SLURM_NODEID": "1"}
        assert placed({**daemons, **OPEN_MPI}) == (4, 2, "65541.mpi", "tux00", 8)

    def test_all_nodes_of_an_allocation_agree(self) -> None:
        on_first = {**SLURM_JOB, **OPEN_MPI, "OMPI_COMM_WORLD_RANK": "0"}
        on_third = {**SLURM_STEP, **OPEN_MPI}
        assert placed(on_first)[0::2] == placed(on_third)[0::2]

    def test_several_mpiruns_of_an_allocation_have_different_ids(self) -> None:
        found = look({**SLURM_STEP, **OPEN_MPI, "PMIX_NAMESPACE": "prterun-tux00-4711@1"})
        assert isinstance(found, Placement)
        assert found.run_id == Taken("65541.prterun-tux00-4711@1", "SLURM_JOB_ID, PMIX_NAMESPACE")

    def test_another_number_of_nodes_is_refused_with_both(self) -> None:
        message = refused({**SLURM_JOB, **OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "3"})
        assert message.startswith("OMPI_COMM_WORLD_SIZE=3, but SLURM_JOB_NODELIST has 4 hosts")

    def test_another_rank_is_refused_with_both(self) -> None:
        message = refused({**SLURM_JOB, **OPEN_MPI})
        assert message.startswith(
            "OMPI_COMM_WORLD_RANK=2 is tux02 in SLURM_JOB_NODELIST, but this node is tux00 (SLURMD_NODENAME)"
        )

    def test_without_a_host_list_the_address_is_missing(self) -> None:
        assert "no variable has the address of the first one" in incomplete(OPEN_MPI)

    def test_several_processes_of_a_node_are_refused(self) -> None:
        message = refused({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"})
        assert "run mpirun -N 1 ferrorun --nproc-per-node=2" in message

    def test_one_process_has_nothing_to_report(self) -> None:
        assert incomplete({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}) == ""


class TestSeveralSchedulers:
    def test_the_innermost_wins_if_they_agree(self) -> None:
        slurm = {**SLURM_STEP, "SLURM_NODEID": "0", "SLURMD_NODENAME": "tux01"}
        assert placed({**slurm, **SKYPILOT}) == placed(SKYPILOT)

    def test_a_complete_one_wins_over_an_incomplete_one(self) -> None:
        assert placed({"JOB_COMPLETION_INDEX": "7", **FLUX}) == placed(FLUX)

    @pytest.mark.parametrize(
        ("environ", "text"),
        [
            (
                {**SLURM_STEP, **SKYPILOT},
                "SkyPilot and Slurm disagree: SKYPILOT_NODE_RANK=0, SLURM_NODEID=1; give --nnodes and --rdzv-endpoint",
            ),
            (
                {**DSTACK, **FLUX},
                "Flux and dstack disagree: FLUX_JOB_NNODES=3, DSTACK_NODES_NUM=2; give --nnodes and --rdzv-endpoint",
            ),
            ({**DSTACK, **OPEN_MPI}, "dstack and Open MPI disagree: DSTACK_NODES_NUM=2, OMPI_COMM_WORLD_SIZE=4; "),
        ],
    )
    def test_disagreement_is_refused_with_both_values(self, environ: dict[str, str], text: str) -> None:
        assert refused(environ).startswith(text)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of this process, without a scheduler and without options."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in list(os.environ):
        if name.startswith(("PET_", "SLURM", "CUDA_", "HIP_", "ROCR_", "OMPI_", "FERROELASTIC_", "TORCHELASTIC_")):
            del os.environ[name]
    return monkeypatch


def settled(*line: str) -> Namespace:
    args = run.parse_args([*line, "train.py"])
    run._ask_scheduler(args)
    return args


@pytest.mark.usefixtures("environment")
class TestCommandLine:
    def test_the_whole_command_is_srun_ferrorun(self, caplog: pytest.LogCaptureFixture) -> None:
        os.environ.update(SLURM_STEP, SLURM_JOB_END_TIME="1795900000")
        os.environ["LOGLEVEL"] = "INFO"
        args = settled()
        assert (args.nnodes, args.nproc_per_node) == ("2", "8")
        assert (args.rdzv_backend, args.rdzv_id, args.rdzv_endpoint) == ("c10d", "65541.0", "tux01:25541")
        assert args.rdzv_conf == "is_host=0,node_rank=1"
        assert os.environ[END_VARIABLE] == "1795900000"
        (record,) = caplog.records
        assert record.levelno == logging.INFO
        assert record.getMessage() == (
            "Slurm: --nnodes=2 (SLURM_STEP_NUM_NODES), node rank 1 (SLURM_NODEID), --rdzv-id=65541.0 (SLURM_JOB_ID, SLURM_STEP_ID), "
            "--rdzv-endpoint=tux01:25541 (the first node of SLURM_STEP_NODELIST; port from the id), "
            "--nproc-per-node=8 (SLURM_GPUS_ON_NODE); --no-scheduler ignores these values"
        )

    def test_the_first_node_reports_by_default(self, caplog: pytest.LogCaptureFixture) -> None:
        os.environ.update(SKYPILOT)
        assert settled().rdzv_conf == "is_host=1,node_rank=0"
        (record,) = caplog.records
        assert record.levelno == logging.WARNING

    @pytest.mark.parametrize(
        "option",
        [
            "--no-scheduler",
            "--standalone",
            "--rdzv-backend=static",
            "--rdzv-endpoint=",
            "--rdzv-id=none",
            "--node-rank=0",
            "--master-addr=127.0.0.1",
            "--master_port=29500",
            "--nnodes=1",
        ],
    )
    @pytest.mark.parametrize("way", ["option", "variable"])
    def test_an_option_of_the_rendezvous_keeps_the_scheduler_out(self, option: str, way: str) -> None:
        os.environ.update(SLURM_STEP)
        if way == "variable":
            name, _, value = option[2:].partition("=")
            os.environ[f"PET_{name.upper().replace('-', '_')}"] = value or ("1" if "=" not in option else "")
        line = [option] if way == "option" else []
        assert vars(settled(*line)) == vars(run.parse_args([*line, "train.py"]))
        assert END_VARIABLE not in os.environ

    def test_a_range_of_nodes_is_kept(self) -> None:
        os.environ.update(SLURM_STEP)
        args = settled("--nnodes=1:2")
        assert (args.nnodes, args.rdzv_endpoint, args.rdzv_conf) == ("1:2", "tux01:25541", "is_host=0,node_rank=1")

    def test_spare_nodes_have_no_rank(self) -> None:
        os.environ.update({**SLURM_STEP, "SLURM_STEP_NODELIST": "tux[00-02]", "SLURM_STEP_NUM_NODES": "3"})
        os.environ.update(SLURM_NODEID="2", SLURM_STEP_TASKS_PER_NODE="1(x3)")
        assert settled("--nnodes=2").rdzv_conf == "is_host=0"

    def test_more_nodes_than_the_scheduler_has_are_refused(self) -> None:
        os.environ.update(SLURM_STEP)
        with pytest.raises(
            UsageError, match=r"--nnodes='4' waits for 4 nodes, but Slurm has 2 \(SLURM_STEP_NUM_NODES\)"
        ):
            settled("--nnodes=4")

    def test_a_shell_without_a_step_reports_that_it_runs_alone(self, caplog: pytest.LogCaptureFixture) -> None:
        os.environ.update(SLURM_JOB)
        args = settled()
        assert (args.nnodes, args.rdzv_backend, args.nproc_per_node) == ("1:1", "static", "8")
        alone, gpus = [record.getMessage() for record in caplog.records]
        assert alone == (
            "Slurm: job 65541 has 4 nodes (SLURM_JOB_NUM_NODES), but this process is not in a step of it (SLURM_STEP_ID): "
            "ferrorun runs on this node alone; run srun ferrorun for all nodes, or give --standalone"
        )
        assert gpus == "Slurm: --nproc-per-node=8 (SLURM_GPUS_ON_NODE); --no-scheduler ignores these values"

    def test_a_shell_without_a_step_does_not_wait_for_other_nodes(self) -> None:
        os.environ.update(SLURM_JOB)
        with pytest.raises(UsageError) as raised:
            settled("--nnodes=2:4")
        assert str(raised.value) == (
            "--nnodes='2:4' waits for other nodes, but their place is unknown: job 65541 has 4 nodes (SLURM_JOB_NUM_NODES), but this "
            "process is not in a step of it (SLURM_STEP_ID); run srun ferrorun for all nodes, or give --standalone"
        )

    def test_one_node_uses_a_local_rendezvous(self) -> None:
        os.environ.update({**SLURM_STEP, "SLURM_STEP_NODELIST": "tux01", "SLURM_STEP_NUM_NODES": "1"})
        os.environ.update(SLURM_NODEID="0", SLURMD_NODENAME="tux01", SLURM_STEP_TASKS_PER_NODE="1")
        args = settled()
        assert (args.nnodes, args.rdzv_backend, args.rdzv_endpoint, args.nproc_per_node) == ("1:1", "static", "", "8")

    def test_a_job_that_a_worker_submitted_is_placed(self) -> None:
        """It inherits the variables of the worker."""
        os.environ.update(SLURM_STEP, TORCHELASTIC_RUN_ID="65540.0")
        assert settled().rdzv_id == "65541.0"

    def test_options_of_the_user_win(self) -> None:
        os.environ.update(SLURM_STEP)
        args = settled("--nproc-per-node=3", "--rdzv-conf=is_host=1")
        assert (args.nproc_per_node, args.rdzv_conf) == ("3", "is_host=0,node_rank=1,is_host=1")
        assert run._late("_parse_rendezvous_config")(args.rdzv_conf)["is_host"] == "1"

    @pytest.mark.parametrize(("of_slurm", "end"), [("1795900000", "1795900000"), ("", "7")])
    def test_the_end_that_the_user_sets_is_kept_unless_slurm_sets_it(self, of_slurm: str, end: str) -> None:
        os.environ.update(SLURM_STEP, SLURM_JOB_END_TIME=of_slurm, FERROELASTIC_JOB_END_S="7")
        settled()
        assert os.environ[END_VARIABLE] == end

    @pytest.mark.parametrize(
        ("visible", "count"),
        [("0,1", "2"), ("", "1"), (None, "8"), ("0,1,2,3,4,5,6,7,8,9", "8"), ("GPU-1a,GPU-2b", "2")],
    )
    def test_hidden_gpus_get_no_worker(self, visible: str | None, count: str) -> None:
        os.environ.update(SLURM_STEP)
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
        assert settled().nproc_per_node == count

    def test_a_namespace_of_a_program_is_left_alone(self) -> None:
        os.environ.update(SLURM_STEP)
        args = Namespace(**vars(run.parse_args(["train.py"])))
        before = dict(vars(args))
        run._ask_scheduler(args)
        assert vars(args) == before

    def test_nothing_is_loaded_without_a_scheduler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in [name for name in sys.modules if name.startswith("ferroelastic._scheduler")]:
            monkeypatch.delitem(sys.modules, name)
        for name in (*SLURM_STEP, *SKYPILOT, *DSTACK, *FLUX, *OPEN_MPI, "JOB_COMPLETION_INDEX"):
            os.environ.pop(name, None)
        settled()
        assert not [name for name in sys.modules if name.startswith("ferroelastic._scheduler")]
