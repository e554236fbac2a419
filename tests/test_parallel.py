"""Threads that read: as many as there are cores to use."""

import joblib
import pytest

from simsid.parallel import thread_count


def test_as_many_threads_as_a_container_has_cores(monkeypatch):
    monkeypatch.setattr(joblib, "cpu_count", lambda: 3)
    assert thread_count(None) == 3 and thread_count(7) == 7
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        thread_count(0)
