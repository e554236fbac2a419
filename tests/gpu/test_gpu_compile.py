"""torch.compile on a GPU, where Inductor generates code around the kernels."""

import attention_cases as attention
import norm_cases as norm
import pytest
import torch
from gpu_training import assert_close, train_tiny
from test_gpu_kernels import draw_with_gap

from simsid.kernels import neighbor_attention, residual_layer_norm, space_aware_memory


def memory_case():
    z, M, _, _ = draw_with_gap((16, 4, 100, 256), 5)
    return lambda z, M: space_aware_memory(2 * z, M, 5, backend="triton").relu(), (z, M)


def attention_case():
    tensors = tuple(attention.inputs(4, (4, 4), 64).values())

    def run(q, k, v, pad_key, pad_value):
        return neighbor_attention(2 * q, k, v, (4, 4), 8, pad_key=pad_key, pad_value=pad_value, backend="triton").relu()

    return run, tensors


def norm_case():
    tensors = tuple(norm.inputs((64, 256)).values())
    return lambda *x: residual_layer_norm(2 * x[0], *x[1:], backend="triton").square(), tensors


CASES = {"memory": memory_case, "attention": attention_case, "layer norm": norm_case}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("op", CASES)
def test_compiled_op_is_the_eager_one(op, dynamic, cuda, full_precision):
    run, tensors = CASES[op]()
    leaves = [tensor.requires_grad_() for tensor in tensors]
    results = []
    for call in (run, torch.compile(run, fullgraph=True, dynamic=dynamic)):
        out = call(*leaves)
        results.append([out, *torch.autograd.grad(out.sum(), leaves)])
    for eager, compiled in zip(*results):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


def test_compiled_step_is_the_eager_one(cuda):
    """Minutes of compilation; without augmentation, whose random numbers compiled code draws in another order."""
    compiled, eager = (
        train_tiny(3, cuda, compile=compile, cuda_graph=False, translate=0.0, scale=0.0) for compile in (True, False)
    )
    assert compiled.means() == pytest.approx(eager.means(), rel=1e-2)
    assert_close(compiled, eager, 5e-2)
