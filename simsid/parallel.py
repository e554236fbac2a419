"""Runs a function over many items in threads: results in order, in bounded memory."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from simsid.arguments import require_whole_number

Item = TypeVar("Item")
Result = TypeVar("Result")


def thread_count(workers: int | None) -> int:
    """Return the number of threads; None is one for each core that this process may use.

    Threads rather than processes: Pillow and NumPy release the interpreter lock while they decode and resize, and
    nothing has to be pickled.

    Raises:
        InputError: `workers` is below 1.
    """
    if workers is None:
        from joblib import cpu_count

        # A container often has fewer cores than the machine, by affinity or by quota.
        return cpu_count()
    return require_whole_number("workers", workers, least=1)


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, ahead: int = 0
) -> Iterator[tuple[Item, Result]]:
    """Yield each item with its result, in order, while threads compute the results that come next.

    Args:
        ahead: results that may be held beyond the two per thread that keep all threads busy.
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
        # Also reached when the caller stops early; calls that have not started are cancelled.
        pool.shutdown(wait=True, cancel_futures=True)


def with_progress(results: Iterable[Result], total: int, what: str) -> Iterable[Result]:
    """Show a progress bar while the results are consumed."""
    from tqdm import tqdm

    return tqdm(results, total=total, desc=what, unit="image", dynamic_ncols=True)
