"""How a native rendezvous ends: in success, in failure, and for one node before the others."""

from __future__ import annotations

import logging
import os
import time

import pytest
from tests.support.forking import fork
from tests.support.native_nodes import Nodes, told
from tests.support.waiting import LONG_S, eventually

from ferroelastic._rust import FailureFacts
from ferroelastic.rendezvous import (
    RendezvousClosedError,
    RendezvousTimeoutError,
)


class TestTheEnd:
    def test_all_have_succeeded(self, nodes: Nodes) -> None:
        host = nodes.host()
        guest = nodes.guest(host)
        nodes.meet(host, guest)
        finished = nodes.pool.submit(host.wait_for_others, LONG_S)
        assert guest.wait_for_others(LONG_S)
        assert finished.result(LONG_S)
        assert (host.is_closed(), guest.is_closed()) == (True, True)

    def test_another_one_fails_meanwhile(self, nodes: Nodes) -> None:
        host = nodes.host()
        guest = nodes.guest(host)
        nodes.meet(host, guest)
        finished = nodes.pool.submit(host.wait_for_others, LONG_S)
        guest.report_failure(time.time_ns(), "rank 1 exited with code 7", facts=FailureFacts(1))
        assert not finished.result(LONG_S)
        interruption = host.interruption()
        assert interruption is not None
        assert interruption.is_failure
        assert [info.rank for info in nodes.meet(host, guest)] == [0, 1]

    def test_another_one_ends_the_job_meanwhile(self, nodes: Nodes) -> None:
        host = nodes.host()
        guest = nodes.guest(host)
        nodes.meet(host, guest)
        finished = nodes.pool.submit(host.wait_for_others, LONG_S)
        guest.shutdown()
        assert finished.result(LONG_S)
        assert host.is_closed()

    def test_another_one_takes_too_long(self, nodes: Nodes) -> None:
        host = nodes.host()
        guest = nodes.guest(host)
        nodes.meet(host, guest)
        with pytest.raises(RendezvousTimeoutError, match=r"the workers of other nodes did not succeed within 0\.01 s"):
            guest.wait_for_others(0.01)
        # It goes, and the others are none the worse for it.
        guest.shutdown()
        assert host.wait_for_others(LONG_S)
        assert host.interruption() is None

    def test_the_host_stays_for_nodes_that_take_too_long(
        self, nodes: Nodes, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(logging.getLogger("ferroelastic"), "propagate", True)
        host = nodes.host()
        guest = nodes.guest(host)
        nodes.meet(host, guest)
        finished = nodes.pool.submit(host.wait_for_others, 0.01)
        assert eventually(lambda: "this node hosts the rendezvous and keeps waiting for them" in caplog.text, LONG_S)
        assert guest.interruption() is None
        assert guest.wait_for_others(LONG_S)
        assert finished.result(LONG_S)

    def test_the_reason_is_reported(self, nodes: Nodes) -> None:
        host = nodes.host()
        guest = nodes.guest(host)
        nodes.meet(host, guest)

        def end_by(error: Exception) -> None:
            try:
                raise error
            finally:
                host.shutdown()

        with pytest.raises(OSError, match="no space left"):
            end_by(OSError("no space left\nat all"))
        interruption = told(guest)
        assert interruption.is_final
        assert interruption.text.endswith("its agent has ended: no space left")

    def test_a_node_announces_its_leave_before_its_workers_are_stopped(self, nodes: Nodes) -> None:
        host = nodes.host((1, 2))
        guest = nodes.guest(host, (1, 2))
        nodes.meet(host, guest)
        guest.say_farewell("its agent was ended by SIGTERM", 143)
        interruption = told(host)
        assert (interruption.is_failure, interruption.is_final) == (False, False)
        assert interruption.text.endswith("left: its agent was ended by SIGTERM")

    def test_a_last_failure_ends_the_job(self, nodes: Nodes) -> None:
        host = nodes.host()
        guest = nodes.guest(host)
        nodes.meet(host, guest)
        guest.report_failure(time.time_ns(), "rank 1 exited with code 7", facts=FailureFacts(1, is_exhausted=True))
        verdict = guest.verdict()
        assert verdict is not None
        assert (verdict.is_failure, verdict.is_final) == (True, True)

    def test_a_lost_node_explains_a_last_failure(self, nodes: Nodes) -> None:
        host = nodes.host((2, 3), last_call_timeout=60)
        guest, lost = nodes.guest(host, (2, 3)), nodes.guest(host, (2, 3))
        nodes.meet(host, guest, lost)
        guest.report_failure(time.time_ns(), "rank 1 exited with code 7", facts=FailureFacts(1, is_exhausted=True))
        lost._get_client().close()  # as the end of its process does
        lost._client = None
        verdict = guest.verdict()
        assert verdict is not None
        assert (verdict.is_failure, verdict.is_final) == (False, False)
        assert [info.world_size for info in nodes.meet(host, guest)] == [2, 2]

    def test_shutting_down_a_node_that_waits_for_a_round(self, nodes: Nodes) -> None:
        host = nodes.host()
        joining = nodes.joins(host)
        assert nodes.has_entered(host)
        host.shutdown()
        with pytest.raises(RendezvousClosedError, match="the rendezvous 'job' is closed"):
            joining.result(LONG_S)

    def test_a_forked_child_shuts_nothing_down(self, nodes: Nodes) -> None:
        host = nodes.host((1, 1))
        host.next_rendezvous()
        pid = fork()
        if pid == 0:
            os._exit(0 if host.shutdown() else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert host.interruption() is None
        assert host.wait_for_others(LONG_S)
