from __future__ import annotations

import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from tests.support.memory_store import MemoryStore

from ferroelastic.utils import _interruptible
from ferroelastic.utils import store as store_util
from ferroelastic.utils.store import DistStoreError, barrier, get_all, store_timeout, synchronize

if TYPE_CHECKING:
    from collections.abc import Callable


class RecordingStore:
    """Writes down what it is asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    @property
    def timeout(self) -> timedelta:
        self.calls.append(("timeout",))
        return timedelta(seconds=1234)

    def __getattr__(self, name: str) -> Any:
        def method(*args: Any) -> Any:
            self.calls.append((name, *args))
            return {"add": 3, "multi_get": [b"value"] * 3}.get(name)

        return method


def in_threads(number: int, function: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(function, range(number)))


@pytest.mark.parametrize("rank", [0, 1])
def test_get_all_makes_the_calls_of_torch(rank: int) -> None:
    store = RecordingStore()
    assert get_all(store, rank, "data", 3) == [b"value"] * 3
    assert store.calls == [
        ("multi_get", ["data0", "data1", "data2"]),
        ("add", "data/finished/num_members", 1),
        ("set", "data/finished/last_member", "<val_ignored>"),
        *([("wait", ["data/finished/last_member"])] if rank == 0 else []),
    ]


def test_barrier_makes_the_calls_of_torch() -> None:
    store = RecordingStore()
    barrier(store, 3, key_prefix="here")
    assert store.calls == [
        ("timeout",),
        ("set_timeout", timedelta(seconds=300)),
        ("add", "here/num_members", 1),
        ("set", "here/last_member", "<val_ignored>"),
        ("wait", ["here/last_member"]),
        ("set_timeout", timedelta(seconds=1234)),
    ]


def test_synchronize_exchanges_data() -> None:
    store = MemoryStore()
    found = in_threads(4, lambda rank: synchronize(store.clone(), f"data{rank}".encode(), rank, 4, "key"))
    assert found == [[b"data0", b"data1", b"data2", b"data3"]] * 4


def test_the_timeout_comes_back_also_after_an_error() -> None:
    store = MemoryStore(timeout_s=7)
    with pytest.raises(DistStoreError):
        barrier(store, 2, "key", barrier_timeout=0.01)
    assert store.timeout == timedelta(seconds=7)
    with store_timeout(store, 3):
        assert store.timeout == timedelta(seconds=3)


def test_barrier_lets_all_pass() -> None:
    store = MemoryStore()
    assert in_threads(4, lambda _: barrier(store.clone(), 4, "key")) == [None] * 4


def test_a_timeout_names_the_missing_ranks() -> None:
    store = MemoryStore()

    def come(rank: int) -> str:
        with pytest.raises(DistStoreError) as caught:
            barrier(
                store.clone(),
                4,
                "key",
                barrier_timeout=1,
                rank=rank,
                rank_tracing_decoder=lambda missing: f"host {missing}",
                trace_timeout=0.1,
            )
        return str(caught.value)

    # Rank 2 is not the last: its trace is there by the time that rank 0 looks for rank 1's.
    messages = dict(zip((0, 2), in_threads(2, lambda index: come(2 * index)), strict=True))
    assert "on rank 0" in messages[0]
    assert "host 1" in messages[0]
    assert "host 3" in messages[0]
    assert "check rank 0 (host 0) for missing rank info" in messages[2]


def test_where_rank_0_is_missing_the_timeout_itself_is_raised() -> None:
    with pytest.raises(DistStoreError, match=r"wait timeout, keys: .*last_member"):
        barrier(MemoryStore(), 2, "key", barrier_timeout=0.01, rank=1)


def test_tracing_takes_a_rank() -> None:
    with pytest.raises(AssertionError, match="rank"):
        barrier(MemoryStore(), 1, "key", rank_tracing_decoder=str)


def test_torchs_own_error_is_recognised() -> None:
    torch: Any = pytest.importorskip("torch")
    theirs = torch._C._DistStoreError
    store: Any = mock.Mock(timeout=timedelta(seconds=1), add=lambda _key, _amount: 1)
    store.wait.side_effect = [theirs("timeout"), theirs("timeout"), None]
    with pytest.raises(theirs, match=r"missing_ranks=\[1\]"):
        barrier(store, 3, "key", rank=0)
    assert issubclass(theirs, RuntimeError)
    assert isinstance(DistStoreError("text"), theirs)


def test_works_on_torchs_stores() -> None:
    torch: Any = pytest.importorskip("torch")
    store = torch.distributed.HashStore()
    found = in_threads(3, lambda rank: store_util.synchronize(store, f"data{rank}".encode(), rank, 3, "key"))
    assert found == [[b"data0", b"data1", b"data2"]] * 3


class Interruption(Exception):  # noqa: N818
    pass


@pytest.fixture
def usr1() -> None:
    def handler(_signum: int, _frame: object) -> None:
        raise Interruption

    signal.signal(signal.SIGUSR1, handler)


def test_a_call_returns_and_raises_as_usual() -> None:
    assert _interruptible.call(divmod, 7, 2) == (3, 1)
    assert _interruptible.call(int, "11", base=2) == 3
    with pytest.raises(ZeroDivisionError):
        _interruptible.call(divmod, 1, 0)


def test_a_signal_interrupts_a_call_that_blocks(usr1: None) -> None:
    started, release = threading.Event(), threading.Event()

    def block() -> None:
        started.set()
        # With the signal blocked in this thread it can only be the main one that sees it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        release.wait()

    def interrupt() -> None:
        started.wait()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    try:
        with pytest.raises(Interruption):
            _interruptible.call(block)
    finally:
        release.set()
        interrupter.join()


def test_off_the_main_thread_a_call_stays_in_its_thread() -> None:
    assert in_threads(1, lambda _: _interruptible.call(threading.get_ident) == threading.get_ident()) == [True]
