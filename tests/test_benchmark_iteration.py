"""benchmarks/batch_norm.py and joint_gradient.py: an op beside PyTorch's, and a training iteration with each."""

import pathlib
import sys

import tiny

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))

import batch_norm
import joint_gradient


def test_batch_norm_is_timed_beside_pytorchs_on_maps_and_in_an_iteration(monkeypatch, capsys):
    monkeypatch.setattr(batch_norm, "SHAPES", ((2, 4, 8, 8),))
    tiny.shrink_demo(monkeypatch)
    batch_norm.main(["--calls", "1"])
    rows = tiny.cells(capsys.readouterr().out)
    for dtype in ("float32", "bfloat16"):
        (forward, both, iteration, discriminator) = [row for row in rows if row[1] == dtype]
        assert forward[0] == "2 x 4 x 8 x 8, forward" and both[0] == "2 x 4 x 8 x 8, forward and backward"
        assert iteration[0] == "iteration of both sides" and discriminator[0] == "iteration of the discriminator alone"
        assert all(float(value) > 0 for row in (forward, both) for value in row[2:])


def test_joint_gradient_is_timed_beside_autograd_on_look_ups_and_in_an_iteration(monkeypatch, capsys):
    monkeypatch.setattr(joint_gradient, "SHAPES", {"tiny": (2, 4, 8, 16)})
    tiny.shrink_demo(monkeypatch)
    calls, reference = [], joint_gradient.space_aware_memory_reference

    def counted(*arguments):
        calls.append(arguments)
        return reference(*arguments)

    monkeypatch.setattr(joint_gradient, "space_aware_memory_reference", counted)
    joint_gradient.main(["--calls", "1"])
    (look_up, *iterations) = tiny.cells(capsys.readouterr().out)[2:]
    assert look_up[0] == "tiny: 2 x 4 x 8 x 16" and all(float(value) > 0 for value in look_up[1:])
    assert [row[0] for row in iterations] == [f"iteration of both sides, {name}" for name in ("float32", "bfloat16")]
    # The look-up alone three times, and those of two trainings of three iterations each: in-painting and decoders.
    assert len(calls) > 3 + 2 * 3
