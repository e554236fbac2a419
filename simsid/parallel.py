"""Threads: how many do not contend with other work, and a function over many items, in order and bounded memory."""

import os
import pathlib
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
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


@dataclass(frozen=True)
class CoreUse:
    """Seconds of work that the cores open to this process had done at one moment; `own` are this process's."""

    moment: float
    work: float
    own: float

    @classmethod
    def now(cls) -> "CoreUse | None":
        """Read /proc/stat; None where there is none. Work of low priority does not count, it gives way."""
        try:
            lines = pathlib.Path("/proc/stat").read_text("ascii").splitlines()
            allowed = os.sched_getaffinity(0)
            ticks = os.sysconf("SC_CLK_TCK")
        except (OSError, AttributeError, ValueError):
            return None
        work = 0
        for name, *numbers in (line.split() for line in lines if re.match(r"cpu\d", line)):
            if int(name[3:]) in allowed:
                user, _nice, system, _idle, _wait, interrupts, soft_interrupts, *_ = map(int, numbers)
                work += user + system + interrupts + soft_interrupts
        return cls(time.monotonic(), work / ticks, time.process_time())

    def busy_elsewhere(self, later: "CoreUse") -> float:
        """Return how many cores other processes kept busy on average between two moments."""
        seconds = max(later.moment - self.moment, 1e-9)
        return max((later.work - self.work - (later.own - self.own)) / seconds, 0.0)


def uncontended_threads(cores: int, busy: float) -> int:
    """Return the threads that do not share a core with other work, at least 1; less than half a core of it is none.

    A thread that waits for one whose core is busy elsewhere spins and gains nothing: with two threads on two cores, one
    of which another process uses, a training step takes twice as long as with one thread.
    """
    return max(1, cores - int(busy + 0.5))


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

    return tqdm(results, total=total, desc=what, unit=" images", dynamic_ncols=True)
