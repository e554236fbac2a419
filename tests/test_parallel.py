"""Threads: their number, the order of results, bounded look-ahead."""

import joblib
import pytest

from simsid.parallel import in_order, thread_count


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
