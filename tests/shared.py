"""Material that lies beside the repository, in ../shared: golden numbers and real films."""

import pathlib

import pytest

SHARED = pathlib.Path(__file__).parents[2] / "shared"
GOLDEN = SHARED / "golden"
ZHANGLAB = SHARED / "data" / "zhanglab" / "chest_xray"

needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs ../shared/golden, which is not in the repository")
needs_zhanglab = pytest.mark.skipif(
    not ZHANGLAB.is_dir(), reason="needs ../shared/data/zhanglab, which is not in the repository"
)
