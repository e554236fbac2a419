"""The benchmark command, its flag, its JSON and the report made of it, on the CPU's shapes."""

import pathlib
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[1]


def run(*arguments, folder=ROOT):
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def test_without_the_flag_benchmarks_are_skipped_with_a_message():
    assert "benchmarks run only with --benchmark" in run("-m", "pytest", "benchmarks/", "-rs", "-k", "norm-Q")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's run takes minutes, and is made by hand")
def test_a_run_says_what_it_left_out_and_its_json_becomes_a_table_and_a_plot(tmp_path):
    results, picture = tmp_path / "speed.json", tmp_path / "speed.png"
    chosen = "neighbor_attention-Q or norm-Q"
    out = run("-m", "pytest", "benchmarks/", "--benchmark", f"--benchmark-json={results}", "-k", chosen)
    assert "left out, 4 times: fused: Triton kernels run on CUDA" in out
    assert "SDPA with an extra key" in out and "nn.MultiheadAttention" not in out

    table = run("benchmarks/report.py", str(results), "--plot", str(picture))
    assert f"torch {torch.__version__}" in table
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    assert rows[0] == ["group", "variant", "wall µs", "GB/s", "speed-up"]
    (batched,) = [row for row in rows if row[:2] == ["residual_layer_norm Q float32 forward", "batched"]]
    assert float(batched[2].replace(",", "")) > 0 and batched[4] == "1.00x"
    assert picture.read_bytes().startswith(b"\x89PNG")
