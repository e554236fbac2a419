"""Runs a function over many files in threads, in order and in bounded memory."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def thread_count(workers: int | None) -> int:
    """Return the number of threads, ``None`` for the cores this process may use.

    Threads, not processes: Pillow and NumPy release the interpreter while they decode and resize, and nothing is
    pickled.

    Raises: ValueError below 1.
    """
    if workers is None:
        from joblib import cpu_count

        # A container often has fewer cores than the machine, by affinity or by quota.
        return cpu_count()
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    return workers


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, ahead: int = 0
) -> Iterator[tuple[Item, Result]]:
    """Yield each item with its result, in order, while threads work on those that come next.

    Arguments:
        ahead: results that may wait beyond the two a thread that keep all threads busy.
    """
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="simsid-read")
    try:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > 2 * workers + ahead:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        # Also where the caller stops early: what has not begun is dropped.
        pool.shutdown(wait=True, cancel_futures=True)


def with_progress(results: Iterable[Result], total: int, what: str) -> Iterable[Result]:
    """Show a bar while results are taken."""
    from tqdm import tqdm

    return tqdm(results, total=total, desc=what, unit="image", dynamic_ncols=True)
