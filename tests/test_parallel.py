"""Threads: their number, the order of results, bounded look-ahead."""

import joblib
import pytest

from simsid.commands import common
from simsid.parallel import CoreUse, in_order, thread_count, uncontended_threads


def test_thread_count_is_the_cores_of_the_container_by_default(monkeypatch):
    monkeypatch.setattr(joblib, "cpu_count", lambda: 3)
    assert thread_count(None) == 3 and thread_count(7) == 7
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        thread_count(0)


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order_and_items_are_taken_a_bounded_number_ahead(workers):
    taken = []

    def endless():
        while True:
            taken.append(len(taken))
            yield taken[-1]

    results = in_order(lambda item: item**2, endless(), workers, ahead=5)
    assert [next(results) for _ in range(20)] == [(i, i**2) for i in range(20)]
    assert len(taken) <= 20 + 2 * workers + 5
    results.close()
    assert list(in_order(abs, [-1, 2], workers)) == [(-1, 1), (2, 2)]


def test_an_exception_of_the_function_reaches_the_caller():
    with pytest.raises(ZeroDivisionError):
        list(in_order(lambda item: 1 // item, [1, 0], 2))


@pytest.mark.parametrize(
    ("cores", "busy", "threads"), [(2, 0.0, 2), (2, 0.4, 2), (2, 0.6, 1), (2, 5.0, 1), (8, 2.6, 5), (1, 0.0, 1)]
)
def test_threads_leave_the_cores_that_other_work_keeps_busy(cores, busy, threads):
    assert uncontended_threads(cores, busy) == threads


def test_own_work_is_not_other_work():
    before, after = CoreUse(10.0, 100.0, 1.0), CoreUse(12.0, 104.0, 2.0)
    assert before.busy_elsewhere(after) == pytest.approx(1.5)
    assert before.busy_elsewhere(CoreUse(12.0, 101.0, 3.0)) == 0.0


def test_machine_leaves_a_busy_core_and_says_so(monkeypatch, capsys):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(common, "STARTED", CoreUse(0.0, 0.0, 0.0))
    monkeypatch.setattr(CoreUse, "now", classmethod(lambda cls: cls(10.0, 12.0, 2.0)))
    assert common._threads_beside_other_work(4) == 3
    assert "other work keeps 1.0 of 4 cores busy, so 3 threads are used; --threads 4" in capsys.readouterr().err
    monkeypatch.setattr(CoreUse, "now", classmethod(lambda _cls: None))
    assert common._threads_beside_other_work(4) == 4 and not capsys.readouterr().err
