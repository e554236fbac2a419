"""Ctrl-C during a training: the first one finishes the iteration and saves the state, the second one stops at once."""

import signal
import threading

from simsid.distributed import ProcessGroup

ASK_EVERY = 8
"""Iterations on GPUs after which the ranks ask each other whether anyone pressed Ctrl-C."""


class GracefulInterrupt:
    """Counts Ctrl-C while its `with` block runs; outside the main thread, which alone gets signals, it does nothing.

    Args:
        group: the ranks, which must stop in the same iteration.
        on_gpu: whether the ranks avoid asking in every iteration, which a GPU would wait for.
    """

    def __init__(self, group: ProcessGroup, on_gpu: bool) -> None:
        self._group = group
        self._every = ASK_EVERY if on_gpu and group.size > 1 else 1
        self._pressed = False
        self._is_main_thread = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "GracefulInterrupt":
        if self._is_main_thread:
            self._previous = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_main_thread:
            signal.signal(signal.SIGINT, self._previous)

    def should_stop(self, step: int) -> bool:
        """Return whether Ctrl-C was pressed on any rank before iteration `step`."""
        return step % self._every == 0 and self._group.any(self._pressed)

    def _press(self, *_: object) -> None:
        if self._pressed:
            raise KeyboardInterrupt
        self._pressed = True
