"""The restart policy of an agent: settings, the hook of a program, local decisions."""

from __future__ import annotations

import re
import signal
import threading
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import pytest
from tests.support.fake_agent import Agent, S, spec

from ferroelastic import _failure
from ferroelastic._failure.model import Kind
from ferroelastic._rust import FailureFacts
from ferroelastic._rust import RestartPolicy as NativePolicy
from ferroelastic.agent.server import NO_RESTART_EXIT_CODE, FailedRound, RestartSettings, RunResult
from ferroelastic.agent.server._policy import Verdict, ask
from ferroelastic.agent.server._progress import ProgressFiles
from ferroelastic.multiprocessing.errors import ProcessFailure

FAILURE = FailedRound("rank 0 fell", 1, ("exit",), 0, 2.5, 1, 3, has_progressed=False)


def failed(exit_code: int) -> RunResult:
    return RunResult(S.FAILED, failures={0: ProcessFailure(0, 999, exit_code, "none")})


class Answers:
    def __init__(self, answer: Any) -> None:
        self.answer, self.asked = answer, list[FailedRound]()

    def decide(self, failure: FailedRound) -> Any:
        self.asked.append(failure)
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


class TestSettings:
    def test_each_one_is_an_option_for_all_nodes(self) -> None:
        options = RestartSettings().options(3)
        names = {"--" + field.name.replace("_", "-") for field in fields(RestartSettings)} - {"--progress-file"}
        assert options.keys() == names | {"--max-restarts"}
        assert (options["--max-restarts"], options["--restart-backoff"], options["--restart-rate"]) == (
            "3",
            "0.25",
            "none",
        )
        assert RestartSettings().options(float("inf"))["--max-restarts"] == "none"

    def test_each_kind_and_cause_of_the_report_may_be_final(self) -> None:
        kinds = set(get_args(Kind)) - {"lost_node"}  # --on-node-failure decides on it
        source = Path(_failure.__file__).with_name("advice.py").read_text()
        causes = set(re.findall(r"\bAdvice\(\s*\"(\w+)\"", source))
        assert len(causes) == 6
        text = ",".join(sorted(kinds | causes))
        assert RestartSettings(fatal_causes=text).fatal_causes == text
        with pytest.raises(ValueError, match="is not one of ") as refused:
            RestartSettings(fatal_causes="none,of these")
        assert str(refused.value).endswith(text.replace(",", ", "))

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("restart_backoff", -1),
            ("restart_backoff_max", float("nan")),
            ("restart_rate", "often"),
            ("fatal_exit_codes", "0"),
            ("fatal_causes", "oom"),
            ("fatal_causes", "stuck,EXIT"),
            ("restarts_without_progress", -1),
            ("on_node_failure", "panic"),
        ],
    )
    def test_a_bad_value_is_named(self, name: str, value: Any) -> None:
        option = "--" + name.replace("_", "-")
        with pytest.raises(ValueError, match=f"^{option}=.* is not valid: "):
            replace(RestartSettings(), **{name: value})

    def test_the_code_that_forbids_a_restart(self) -> None:
        policy = NativePolicy({}, "job")
        codes = [code for code in range(1, 256) if policy.decide(FailureFacts(code)).reason == "no_restart_code"]
        assert codes == [NO_RESTART_EXIT_CODE]


class TestHook:
    @pytest.mark.parametrize(
        ("answer", "verdict"),
        [
            (None, Verdict()),
            (0, Verdict(delay_s=0.0)),
            (2.5, Verdict(delay_s=2.5)),
            ("no\ndata ", Verdict(final_reason="no data")),
            ("a\udc80", Verdict(final_reason="a\\udc80")),
        ],
    )
    def test_an_answer(self, answer: Any, verdict: Verdict) -> None:
        policy = Answers(answer)
        assert ask(policy, FAILURE) == verdict
        assert policy.asked == [FAILURE]

    @pytest.mark.parametrize("answer", [True, -1, float("nan"), float("inf"), 10**400, 1e10, " ", b"no", [1]])
    def test_nonsense_is_reported_with_its_value(self, answer: Any, caplog: pytest.LogCaptureFixture) -> None:
        with mock.patch("ferroelastic.agent.server._policy.logger.propagate", new=True):
            assert ask(Answers(answer), FAILURE) == Verdict()
        assert (
            f"returned {repr(answer)[:200]}, which is neither None, a delay of up to a year in seconds nor a reason"
            in caplog.text
        )

    @pytest.mark.parametrize("error", [ValueError("bad"), SystemExit(3)])
    def test_one_that_raises(self, error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
        with mock.patch("ferroelastic.agent.server._policy.logger.propagate", new=True):
            assert ask(Answers(error), FAILURE) == Verdict()
        assert "failed: the settings apply" in caplog.text

    def test_one_that_blocks(self, caplog: pytest.LogCaptureFixture) -> None:
        class Blocks:
            def __init__(self) -> None:
                self.free = threading.Event()

            def decide(self, _: FailedRound) -> None:
                self.free.wait()

        blocks = Blocks()
        with mock.patch("ferroelastic.agent.server._policy.logger.propagate", new=True):
            assert ask(blocks, FAILURE, timeout_s=0.05) == Verdict()
        blocks.free.set()
        assert "did not return within 0.05 s" in caplog.text

    def test_it_is_asked_once_for_each_failure(self) -> None:
        policy = Answers(0)
        agent = Agent(spec(max_restarts=2, restart_policy=policy), *[failed(7)] * 3)
        agent.run()
        assert [(one.exit_code, one.restarts, one.max_restarts) for one in policy.asked] == [
            (7, 0, 2),
            (7, 1, 2),
            (7, 2, 2),
        ]
        assert agent.restart_decision == "no restart is left (--max-restarts=2)"

    def test_it_ends_the_run(self) -> None:
        agent = Agent(spec(max_restarts=2, restart_policy=Answers("the data is gone")), failed(7))
        assert agent.run().is_failed()
        assert (agent.started, agent._remaining_restarts, agent.restart_decision) == (1, 2, "the data is gone")


class TestLocalDecisions:
    """With a rendezvous handler that makes none."""

    def test_failures_right_after_the_start_are_delayed(self) -> None:
        agent = Agent(spec(max_restarts=3), *[failed(7)] * 4)
        with mock.patch("time.sleep") as sleep:
            agent.run()
        delays = [call.args[0] for call in sleep.call_args_list]
        assert len(delays) == 2
        assert 0.2 <= delays[0] <= 0.25
        assert 0.4 <= delays[1] <= 0.5

    def test_no_delay(self) -> None:
        agent = Agent(spec(max_restarts=3, restart_settings=RestartSettings(restart_backoff=0)), *[failed(7)] * 4)
        with mock.patch("time.sleep") as sleep:
            agent.run()
        sleep.assert_not_called()

    @pytest.mark.parametrize(
        ("code", "decision"),
        [
            (NO_RESTART_EXIT_CODE, "exit code 97 forbids a restart"),
            (3, "exit code 3 is final (--fatal-exit-codes)"),
            (-signal.SIGSEGV, "SIGSEGV is final (--fatal-exit-codes)"),
        ],
    )
    def test_final_codes(self, code: int, decision: str) -> None:
        settings = RestartSettings(fatal_exit_codes="3,SIGSEGV")
        agent = Agent(spec(restart_settings=settings), failed(code))
        assert agent.run().is_failed()
        assert (agent.started, agent.restart_decision) == (1, decision)

    def test_a_healthy_round_gives_restarts_back(self) -> None:
        settings = RestartSettings(healthy_window=1e-6, restart_backoff=0)
        agent = Agent(spec(max_restarts=1, restart_settings=settings), *[failed(7)] * 5, S.SUCCEEDED)
        assert not agent.run().is_failed()
        assert (agent.started, agent._restart_count()) == (6, 5)


class TestProgressFiles:
    def test_a_file_that_is_made_or_changed(self, tmp_path: Path) -> None:
        files = ProgressFiles(str(tmp_path / "**" / "*.pt"))
        file = tmp_path / "run" / "step.pt"
        file.parent.mkdir()
        for text in ("1", "12"):
            files.begin_round()
            assert not files.have_changed()
            file.write_text(text)
            assert files.have_changed()
        files.begin_round()
        file.unlink()
        (tmp_path / "other.txt").touch()
        assert not files.have_changed()
