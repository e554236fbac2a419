"""Silences warnings and log records of decoders in the thread that reads a file, and in no other."""

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator
from typing import Any


class _ThreadMark(logging.Filter):
    """Knows whether this thread reads a file; serves as the module pattern of a warnings filter and as a log filter."""

    pattern = "(?!)"
    """scikit-learn copies warnings filters into its workers by this attribute; a copy must not match any module."""

    def __init__(self) -> None:
        super().__init__()
        self._state = threading.local()
        self._lock = threading.Lock()
        self._entry = ("ignore", None, Warning, self, 0)

    def match(self, _: str) -> bool:
        return getattr(self._state, "reading", False)

    def filter(self, record: logging.LogRecord) -> bool:  # noqa: ARG002
        return not self.match("")

    def install(self) -> None:
        """Become the first warnings filter; `catch_warnings` elsewhere can drop the entry, so look each time."""
        with self._lock:
            filters: Any = warnings.filters  # a list, which the type of the module hides
            if not filters or filters[0] is not self._entry:
                with contextlib.suppress(ValueError):
                    filters.remove(self._entry)
                filters.insert(0, self._entry)

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        outer = self.match("")
        self._state.reading = True
        try:
            yield
        finally:
            self._state.reading = outer


_MARK = _ThreadMark()


def silence_loggers(package: str) -> None:
    """Drop the log records of a package, which must be imported, while `quiet` is active in their thread.

    A logger's filter does not see the records of the loggers below it, so each logger gets the filter.
    """
    for name in [package, *logging.root.manager.loggerDict]:
        if name == package or name.startswith(package + "."):
            logging.getLogger(name).addFilter(_MARK)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings, and the loggers named to `silence_loggers`, in this thread only.

    `warnings.catch_warnings` replaces a list that all threads share, so parallel readers cannot use it.
    """
    _MARK.install()
    with _MARK.here():
        yield
