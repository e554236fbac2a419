"""The kernels as machine code without a GPU: Triton's PTX for sm_80 and sm_90 through launchers, ops and autograd.

One process for the whole file: Triton's interpreter, which tests/kernels switches on, must be off in it.
"""

import functools
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys

import pytest
from ptx.cases import CASES
from test_ptx_arithmetic import ARITHMETIC

from simsid.kernels.backend import TRITON_INSTALLED

FOLDER = pathlib.Path(__file__).parent
UNDERSTOOD = ("3.6", "3.7", "3.8", "3.9")  # versions of Triton whose PTX was run
SHORT = [case.name for case in CASES if not case.long]
# Kernels in which threads of one warp write different roundings of one sum to one address. A GPU keeps one of them,
# always the same one as far as is known, but no manual promises which.
AMBIGUOUS = {"memory_select_kernel", "memory_softmax_gradient_kernel", "neighbor_attention_backward_kernel"}
KERNELS = {
    "memory_scores_kernel",
    "memory_cosine_kernel",
    "memory_select_kernel",
    "memory_softmax_gradient_kernel",
    "memory_joint_gradient_kernel",
    "memory_query_gradient_kernel",
    "memory_items_gradient_kernel",
    "neighbor_attention_forward_kernel",
    "neighbor_attention_backward_kernel",
    "residual_layer_norm_forward_kernel",
    "residual_layer_norm_backward_kernel",
    "sum_parts_kernel",
}


def why_not():
    """Return why the PTX of the installed Triton cannot be run, or None."""
    if not TRITON_INSTALLED:
        return "Triton is not installed"
    version = importlib.metadata.version("triton")
    if not version.startswith(tuple(f"{known}." for known in UNDERSTOOD)):
        return f"the PTX of Triton {version} has not been tried; the interpreter knows that of {', '.join(UNDERSTOOD)}"
    return None


needs_ptx = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def run_script(name, *arguments):
    """Run a script of this folder on compiled Triton and return the JSON that it prints."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(FOLDER / name), "--json", *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


@functools.cache
def results():
    return {result["name"]: result for result in run_script("run.py")["cases"]}


@needs_ptx
class TestKernels:
    @pytest.mark.parametrize("name", SHORT)
    def test_kernels_agree_with_the_reference_and_have_no_fault(self, name):
        assert results()[name]["fault"] is None, results()[name]["fault"]

    @pytest.mark.parametrize("name", [name for name in SHORT if name.startswith("sm_90")])
    def test_products_are_fenced_and_waited_for_on_every_path(self, name):
        assert results()[name]["order"] == []

    @pytest.mark.parametrize("arch", [80, 90])
    def test_cases_reach_every_kernel(self, arch):
        ran = {kernel for name in SHORT if name.startswith(f"sm_{arch}") for kernel in results()[name]["kernels"]}
        assert ran == KERNELS

    def test_cases_of_sm_90_use_warp_groups(self):
        memory = [result for name, result in results().items() if name.startswith("sm_90 memory")]
        assert all(result["fences"] > 0 for result in memory if result["products"])
        assert sum(result["products"] > 0 for result in memory) >= 5

    def test_ambiguous_writes_are_in_the_known_kernels_alone(self):
        assert {kernel for result in results().values() for kernel in result["ambiguous"]} <= AMBIGUOUS

    def test_every_arithmetic_opcode_of_the_kernels_is_tested_alone(self):
        elsewhere = (
            "ld.",
            "st.",
            "cp.",
            "bar.",
            "bra",
            "ret",
            "shfl.",
            "redux.",
            "ldmatrix.",
            "stmatrix.",
            "mma.",
            "wgmma.",
            "fence.",
        )
        used = {
            opcode for result in results().values() for opcode in result["opcodes"] if not opcode.startswith(elsewhere)
        }
        assert used - {opcode for opcode, *_ in ARITHMETIC} <= {"setp.le.bf16x2"}
