"""Launches of known calls, which go past Triton's own look-up of a compiled kernel."""

import json
import os
import subprocess
import sys

from harness import ROOT, needs_compiler

SCRIPT = """
import json, sys

sys.path.insert(0, "benchmarks")
import host_time
import torch
from simsid.kernels import launch

launched, ways = [], []


def driver(*arguments):
    launched.append([(str(x.dtype), x.data_ptr() % 16) if isinstance(x, torch.Tensor) else x for x in arguments])


def count(compiled_way, *plan):
    ways[-1] += 1
    return compiled_way(*plan)


by_triton = launch._by_triton
launch._carrier = lambda launched: count(by_triton, launched)
host_time.NoDriver(driver).set()
results = {}
with host_time.on_cpu():
    for name in sys.argv[1:]:
        call, tensors = host_time.calls()[name]
        inputs, calls = [x.clone().requires_grad_() for x in tensors], []
        ways.clear()
        for _ in range(4):
            launched.clear()
            ways.append(0)
            torch.autograd.grad(call(*inputs), inputs, torch.ones_like(inputs[0]))
            calls.append(list(launched))
        ways.append(0)
        with launch.record_launches() as recorded:
            torch.autograd.grad(call(*inputs), inputs, torch.ones_like(inputs[0]))
        results[name] = {"calls": calls, "looked up": ways[:4], "recorded": len(recorded)}
print(json.dumps(results, default=lambda x: type(x).__name__))
"""


@needs_compiler
def test_known_call_hands_the_driver_what_triton_hands_it_and_looks_nothing_up():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [environment.get("PYTHONPATH"), str(ROOT)]))
    launches = {"the same without pads": 2, "residual_layer_norm": 3}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *launches], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name, result in json.loads(done.stdout).items():
        first, *others = result["calls"]
        assert len(first) == launches[name] and all(call == first for call in others), name
        # The first call goes through all checks, the second launches what the first one recorded.
        assert result["looked up"] == [launches[name], launches[name], 0, 0], name
        assert result["recorded"] == launches[name], "whoever records launches sees them"
