"""``LocalElasticAgent`` with real workers, programs and functions."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from tests.conformance import stubs, workers

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conformance.implementations import Implementation


@pytest.fixture
def shell(make_local_agent: Callable[..., Any]) -> Callable[..., Any]:
    return lambda script, **options: make_local_agent("/bin/sh", "-c", script, **options)


def exit_codes(result: Any) -> dict[int, int]:
    return {rank: failure.exitcode for rank, failure in result.failures.items()}


def logs(folder: Path, name: str) -> dict[str, str]:
    """Content of the log files of that name, by attempt and rank."""
    return {"/".join(path.parts[-3:-1]): path.read_text() for path in sorted(folder.glob(f"logs/*/*/*/{name}"))}


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


# ---- runs


@pytest.mark.needs("exit-codes-of-events")
def test_programs(
    impl: Implementation, shell: Callable[..., Any], tmp_path: Path, event_log: Any, metric_log: Any
) -> None:
    agent = shell(
        "echo out of $RANK; echo err of $RANK >&2",
        agent={"redirects": "ALL"},
        event_log_handler=event_log.name,
    )
    result = agent.run()
    assert isinstance(result, impl.agent.RunResult)
    assert result.state == impl.agent.WorkerState.SUCCEEDED
    assert (result.return_values, result.failures) == ({0: None, 1: None}, {})
    assert logs(tmp_path, "stdout.log") == {"attempt_0/0": "out of 0\n", "attempt_0/1": "out of 1\n"}
    assert logs(tmp_path, "stderr.log") == {"attempt_0/0": "err of 0\n", "attempt_0/1": "err of 1\n"}
    pids = {str(worker.id) for worker in agent.get_worker_group().workers}
    assert len(pids) == 2
    started = event_log.named("torchelastic.worker.status.START")
    assert {event["metadata"]["worker_id"] for event in started} == pids
    ended = event_log.named("torchelastic.worker.status.SUCCEEDED")
    assert [event["metadata"]["global_rank"] for event in ended] == [0, 1]
    assert {event["metadata"]["metadata"]["entry_point"] for event in ended} == {"sh"}
    counted = metric_log.values()
    assert counted["LocalElasticAgent._start_workers.success"] == counted["SimpleElasticAgent.run.success"] == 1
    assert counted["LocalElasticAgent._monitor_workers.success"] == 1
    assert counted["workers.trainer.run_success_no_retries"] == 1


def test_functions_return_their_values_by_global_rank(
    impl: Implementation, store: Any, make_local_agent: Callable[..., Any]
) -> None:
    """On the second of two nodes. The first one is made up."""
    store.set("torchelastic/assigned_ranks/1", "[2, 5, 2, 5]")
    store.add("torchelastic/agent/terminal_state/num_members", 1)
    agent = make_local_agent(workers.give_rank, 10, nproc=3, rdzv_handler=stubs.rendezvous(impl, store, 1, 2))
    result = agent.run()
    assert result.return_values == {2: 20, 3: 30, 4: 40}
    assert agent.get_worker_group().group_rank == 1


def test_spawned_functions(make_local_agent: Callable[..., Any]) -> None:
    result = make_local_agent(workers.give_rank, nproc=1, agent={"start_method": "spawn"}).run()
    assert result.return_values == {0: 0}


def test_a_second_run(impl: Implementation, make_local_agent: Callable[..., Any]) -> None:
    agent = make_local_agent(workers.give_rank, 10)
    for _ in range(3):
        result = agent.run()
        assert (result.state, result.return_values) == (impl.agent.WorkerState.SUCCEEDED, {0: 0, 1: 10})


def test_restarts_of_a_second_run(impl: Implementation, shell: Callable[..., Any], tmp_path: Path) -> None:
    agent = shell(f"echo $TORCHELASTIC_RESTART_COUNT >> {tmp_path}/counts; exit 3", nproc=1, max_restarts=1)
    assert [exit_codes(agent.run()) for _ in range(2)] == [{0: 3}, {0: 3}]
    counts = (tmp_path / "counts").read_text().split()
    assert counts == impl.expect("restarts-of-a-run", torch=["0", "1", "1"], ours=["0", "1", "0", "1"])


@pytest.mark.needs("exit-codes-of-events")
def test_a_failure(impl: Implementation, shell: Callable[..., Any], event_log: Any) -> None:
    error = '{"message": {"message": "boom", "extraInfo": {"py_callstack": "trace", "timestamp": "17"}}}'
    agent = shell(
        f"if [ $RANK = 0 ]; then exec sleep 1000; fi; echo '{error}' > $TORCHELASTIC_ERROR_FILE; exit 42",
        event_log_handler=event_log.name,
    )
    result = agent.run()
    assert (result.state, result.return_values) == (impl.agent.WorkerState.FAILED, {})
    assert exit_codes(result) == impl.expect("real-failures", torch={0: -15, 1: 42}, ours={1: 42})
    failure = result.failures[1]
    assert isinstance(failure, impl.errors.ProcessFailure)
    assert (failure.local_rank, failure.message["message"], failure.timestamp) == (1, "boom", 17)
    assert failure.error_file.endswith("/attempt_0/1/error.json")
    assert all(is_gone(worker.id) for worker in agent.get_worker_group().workers)
    ended = event_log.named("torchelastic.worker.status.FAILED")
    (metadata,) = [event["metadata"] for event in ended if event["metadata"]["global_rank"] == 1]
    assert json.loads(metadata["raw_error"])["message"]["message"] == "boom"
    assert (metadata["metadata"]["exit_code"], metadata["metadata"]["worker_pid"]) == ([42], [failure.pid])
    stopped = event_log.named("torchelastic.worker.status.TERMINATED")
    ranks = impl.expect("real-failures", torch=[], ours=[0])
    assert [event["metadata"]["global_rank"] for event in stopped] == ranks


def test_an_exception_in_a_function(make_local_agent: Callable[..., Any]) -> None:
    result = make_local_agent(workers.raise_error, "boom", nproc=1).run()
    assert exit_codes(result) == {0: 1}
    assert result.failures[0].message["message"] == "ValueError: boom"
    assert "raise_error" in result.failures[0].message["extraInfo"]["py_callstack"]


def test_a_restart(make_local_agent: Callable[..., Any], metric_log: Any) -> None:
    agent = make_local_agent(workers.fail_unless_restarted, 1, 9, max_restarts=2)
    result = agent.run()
    assert result.return_values == {0: "attempt 1 of rank 0", 1: "attempt 1 of rank 1"}
    assert agent._remaining_restarts == 1
    assert agent._rdzv_handler.rounds == 2
    assert metric_log.values("workers.trainer.")["run_success_with_retries"] == 1


def test_restarts_run_out(shell: Callable[..., Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    agent = shell(
        "echo attempt $TORCHELASTIC_RESTART_COUNT of $TORCHELASTIC_MAX_RESTARTS; exit 5",
        nproc=1,
        max_restarts=2,
        agent={"tee": "OUT", "log_line_prefix_template": "[${role_name} ${rank}/${local_rank} ${other}] "},
    )
    assert exit_codes(agent.run()) == {0: 5}
    assert logs(tmp_path, "stdout.log") == {f"attempt_{n}/0": f"attempt {n} of 2\n" for n in range(3)}
    assert capfd.readouterr().out == "".join(f"[trainer 0/0 ${{other}}] attempt {n} of 2\n" for n in range(3))


def test_a_membership_change(impl: Implementation, shell: Callable[..., Any], tmp_path: Path) -> None:
    """Restarts the workers, with the same restart count."""
    agent = shell(f"echo run; if mkdir {tmp_path}/first; then exec sleep 1000; fi", nproc=1, agent={"redirects": "OUT"})
    original = agent._monitor_workers

    def monitor(group: Any) -> Any:
        agent._rdzv_handler.waiting = int(agent._rdzv_handler.rounds == 1 and (tmp_path / "first").exists())
        return original(group)

    agent._monitor_workers = monitor
    assert agent.run().state == impl.agent.WorkerState.SUCCEEDED
    assert (agent._rdzv_handler.rounds, agent._remaining_restarts) == (2, 0)
    kept = impl.expect("attempts-are-kept", torch=["attempt_0/0"], ours=["attempt_0/0", "attempt_0.1/0"])
    assert sorted(logs(tmp_path, "stdout.log")) == sorted(kept)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal(impl: Implementation, shell: Callable[..., Any], tmp_path: Path, number: signal.Signals) -> None:
    os.mkfifo(tmp_path / "go")
    agent = shell(f"read line < {tmp_path}/go; kill -{int(number)} {os.getpid()}; exec sleep 1000", nproc=1)
    original = agent._monitor_workers

    def monitor(group: Any) -> Any:
        agent._monitor_workers = original
        # torch's agent is to sleep when the signal comes: raised within Popen.poll() it can leave the lock of the Popen taken, and
        # the worker is then given up after 30 s. Ours waits in its monitor.
        found = original(group) if impl.is_torch else None
        (tmp_path / "go").write_text("\n")
        return found or original(group)

    agent._monitor_workers = monitor
    with pytest.raises(impl.mp.SignalException) as raised:
        agent.run()
    assert raised.value.sigval == number
    (worker,) = agent.get_worker_group().workers
    assert is_gone(worker.id)


def test_how_soon_an_exit_is_noticed(impl: Implementation, shell: Callable[..., Any]) -> None:
    interval_s = 2
    agent = shell("exit 0", nproc=1, monitor_interval=interval_s)
    begin = time.monotonic()
    agent.run()
    waited_for_it = time.monotonic() - begin >= interval_s
    assert waited_for_it == impl.expect("interval-is-a-bound", torch=True, ours=False)


# ---- the environment of workers, compared as a whole


def environments(make_local_agent: Callable[..., Any], tmp_path: Path, **fields: Any) -> dict[int, dict[str, str]]:
    """The environment of two programs, exactly as they got it."""
    assert not make_local_agent("/usr/bin/env", "-0", agent={"redirects": "OUT"}, **fields).run().is_failed()
    found = {}
    for path in tmp_path.glob("logs/*/attempt_0/*/stdout.log"):
        pairs = (line.split("=", 1) for line in path.read_text().split("\0") if line)
        found[int(path.parent.name)] = dict(pairs)
        found[int(path.parent.name)].pop("FERROELASTIC_STOP_FILE", None)  # not in torch
    return found


AGENTS = {
    "GROUP_RANK": "0",
    "GROUP_WORLD_SIZE": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "4242",
    "ROLE_NAME": "trainer",
    "ROLE_WORLD_SIZE": "2",
    "TORCHELASTIC_MAX_RESTARTS": "3",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_RUN_ID": "the-run",
    "TORCHELASTIC_USE_AGENT_STORE": "False",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    "WORLD_SIZE": "2",
}


@pytest.mark.parametrize(
    ("outer", "fields", "added"),
    [
        ({}, {}, [{"LOCAL_RANK": "0"}, {"LOCAL_RANK": "1"}]),
        (
            {
                "OMP_NUM_THREADS": "7",
                "CUDA_VISIBLE_DEVICES": "4,5",
                "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
                "RANK": "9",
            },
            {"master_addr": "elsewhere", "master_port": 99},
            [
                {
                    "LOCAL_RANK": str(rank),
                    "OMP_NUM_THREADS": "7",
                    "CUDA_VISIBLE_DEVICES": "4,5",
                    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
                    "MASTER_ADDR": "elsewhere",
                    "MASTER_PORT": "99",
                }
                for rank in range(2)
            ],
        ),
        pytest.param(
            {"CUDA_VISIBLE_DEVICES": "4, GPU-5"},
            {"virtual_local_rank": True},
            [{"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": device} for device in ("4", "GPU-5")],
            marks=pytest.mark.needs("virtual-local-rank"),
        ),
        pytest.param(
            {},
            {"virtual_local_rank": True},
            [{"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": device} for device in ("0", "1")],
            marks=pytest.mark.needs("virtual-local-rank"),
        ),
        pytest.param(
            {"HIP_VISIBLE_DEVICES": "", "CUDA_VISIBLE_DEVICES": "4,5"},
            {"virtual_local_rank": True},
            [{"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": device, "HIP_VISIBLE_DEVICES": ""} for device in ("4", "5")],
            marks=pytest.mark.needs("virtual-local-rank"),
        ),
    ],
)
def test_the_environment_of_a_program(
    make_local_agent: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    outer: dict[str, str],
    fields: dict[str, Any],
    added: list[dict[str, str]],
) -> None:
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in outer.items():
        monkeypatch.setenv(name, value)
    found = environments(make_local_agent, tmp_path, max_restarts=3, **fields)
    inherited = dict(os.environ)
    (run_folder,) = (tmp_path / "logs").iterdir()
    assert found == {
        rank: inherited
        | AGENTS
        | {"RANK": str(rank), "ROLE_RANK": str(rank)}
        | {"TORCHELASTIC_ERROR_FILE": f"{run_folder}/attempt_0/{rank}/error.json"}
        | added[rank]
        for rank in range(2)
    }


def test_the_environment_of_a_function(
    impl: Implementation,
    store: Any,
    make_local_agent: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("INHERITED", "yes")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    handler = stubs.rendezvous(impl, store, use_agent_store=True)
    make_local_agent(workers.write_environment, str(tmp_path), rdzv_handler=handler).run()
    (run_folder,) = (tmp_path / "logs").iterdir()
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert ("FERROELASTIC_STOP_FILE" in found) == impl.expect("stop-file", torch=False, ours=True)
        found.pop("FERROELASTIC_STOP_FILE", None)
        assert found == dict(os.environ) | AGENTS | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "ROLE_RANK": str(rank),
            "TORCHELASTIC_ERROR_FILE": f"{run_folder}/attempt_0/{rank}/error.json",
            "TORCHELASTIC_MAX_RESTARTS": "0",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }


@pytest.mark.needs("virtual-local-rank")
def test_more_ranks_than_devices(make_local_agent: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    agent = make_local_agent("/bin/true", virtual_local_rank=True)
    with pytest.raises(ValueError, match="local_rank 2 exceeds available GPUs in CUDA_VISIBLE_DEVICES=4,5"):
        agent._set_local_rank_env({}, 2, agent.get_worker_group().spec)


@pytest.mark.needs("virtual-local-rank")
def test_devices_of_rocm(
    impl: Implementation, make_local_agent: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "6, 7")
    agent = make_local_agent("/bin/true", virtual_local_rank=True)
    spec = agent.get_worker_group().spec
    environment: dict[str, str] = {}
    agent._set_local_rank_env(environment, 1, spec)
    assert environment == impl.by_version(
        "hip-visible-devices",
        before={"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": "5"},
        since={"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": "7", "HIP_VISIBLE_DEVICES": "7"},
    )
    variable = impl.by_version(
        "hip-visible-devices", before="CUDA_VISIBLE_DEVICES=4,5", since="HIP_VISIBLE_DEVICES=6, 7"
    )
    with pytest.raises(ValueError, match=f"local_rank 2 exceeds available GPUs in {variable}"):
        agent._set_local_rank_env({}, 2, spec)


@pytest.mark.needs("hostname-in-prefixes")
def test_the_host_in_prefixes(shell: Callable[..., Any], capfd: pytest.CaptureFixture[str]) -> None:
    agent = {"tee": "OUT", "log_line_prefix_template": "${hostname}:${rank}: "}
    shell("echo hello", nproc=1, agent=agent).run()
    assert capfd.readouterr().out == f"{socket.gethostname()}:0: hello\n"


def test_macros_in_arguments(make_local_agent: Callable[..., Any], tmp_path: Path) -> None:
    make_local_agent("/usr/bin/touch", f"{tmp_path}/of_${{local_rank}}", f"{tmp_path}/$other").run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["$other", "logs", "of_0", "of_1"]


# ---- hooks


def pcontext(pids: dict[int, int]) -> Any:
    return mock.Mock(**{"pids.return_value": pids, "wait.return_value": None})


@pytest.mark.needs("shutdown-timeout")
def test_stopping_hands_the_timeout_on(impl: Implementation, make_local_agent: Callable[..., Any]) -> None:
    agent = make_local_agent("/bin/true", agent={"shutdown_timeout": 150})
    agent._pcontext = pcontext({})
    agent._stop_workers(agent.get_worker_group())
    grace_s = impl.expect("grace-everywhere", torch=30, ours=150)
    agent._pcontext.close.assert_called_once_with(signal.SIGTERM, grace_s)


@pytest.mark.needs("shutdown-timeout")
def test_shutting_down_hands_signal_and_timeout_on(make_local_agent: Callable[..., Any]) -> None:
    agent = make_local_agent("/bin/true")
    agent._pcontext = pcontext({})
    agent._shutdown(signal.SIGINT, timeout=7)
    agent._pcontext.close.assert_called_once_with(signal.SIGINT, 7)


def test_workers_that_the_agent_does_not_know(impl: Implementation, make_local_agent: Callable[..., Any]) -> None:
    agent = make_local_agent("/bin/true")
    agent._pcontext = pcontext({0: 1, 1: 2})
    assert agent._monitor_workers(agent.get_worker_group()).state == impl.agent.WorkerState.UNKNOWN


def test_before_the_workers_are_started(make_local_agent: Callable[..., Any]) -> None:
    agent = make_local_agent("/bin/true")
    with pytest.raises(AssertionError):
        agent._monitor_workers(agent.get_worker_group())
    with pytest.raises(AssertionError):
        agent._start_workers(agent.get_worker_group())


@pytest.mark.needs("uninterruptible-state")
@pytest.mark.parametrize(
    ("explicit", "variable", "expected"),
    [(None, None, 0), (None, "2.5", 2.5), (None, "x", 0), (None, "-1", 0), (3, "2.5", 3), (0, "2.5", 0), (-2, None, 0)],
)
def test_where_the_limit_of_uninterruptible_sleep_comes_from(
    impl: Implementation, monkeypatch: pytest.MonkeyPatch, explicit: Any, variable: str | None, expected: float
) -> None:
    module = impl("agent.server.local_elastic_agent")
    if variable is not None:
        monkeypatch.setenv(module.TORCHELASTIC_UNINTERRUPTIBLE_STATE_TIMEOUT, variable)
    found = module._resolve_uninterruptible_state_timeout(explicit)
    assert (found, type(found)) == (expected, float)


@pytest.mark.needs("uninterruptible-state")
def test_a_worker_that_is_stuck(
    impl: Implementation, make_local_agent: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = impl("agent.server.local_elastic_agent")
    monkeypatch.setattr(module, "read_proc_state", lambda pid: "D" if pid == 4711 else "S")
    agent = make_local_agent("/bin/true", max_restarts=3, agent={"uninterruptible_state_timeout": 0.001})
    group = agent.get_worker_group()
    for rank, worker in enumerate(group.workers):
        worker.global_rank, worker.id = rank + 10, (4710, 4711)[rank]
    agent._pcontext = pcontext({0: 4710, 1: 4711})
    assert agent._monitor_workers(group).state == impl.agent.WorkerState.HEALTHY
    assert list(agent._uninterruptible_state_first_seen) == [4711]
    agent._uninterruptible_state_first_seen[4711] -= 5
    result = agent._monitor_workers(group)
    assert result.state == impl.agent.WorkerState.UNHEALTHY
    assert agent._remaining_restarts == 0
    assert sorted(result.failures) == impl.expect("stuck-is-failed", torch=[], ours=[11])


@pytest.mark.needs("uninterruptible-state")
def test_dwell_is_forgotten(
    impl: Implementation, make_local_agent: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = impl("agent.server.local_elastic_agent")
    states = iter(["D", "S", None])
    monkeypatch.setattr(module, "read_proc_state", lambda _pid: next(states))
    agent = make_local_agent("/bin/true")
    assert [agent._update_uninterruptible_dwell(1, "r", 10) for _ in range(3)] == [0.0, None, None]
    assert agent._uninterruptible_state_first_seen == {}
    agent._uninterruptible_state_first_seen[12345] = 0.0
    agent._pcontext = pcontext({})
    assert agent._check_uninterruptible_state_timeout(agent.get_worker_group(), 1) is None
    assert agent._uninterruptible_state_first_seen == {}
