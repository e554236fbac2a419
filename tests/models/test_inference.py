"""Frozen copies: the same function as the model, independent of it, and cheap to make for one call."""

import copy

import numpy as np
import pytest
import torch
from test_model import images, lively
from torch import nn

from simsid import Model, freeze
from simsid.models.inference import FrozenModel

CHANGES = [
    {},
    {"memory": "queue"},
    {"decoder_memory": "subpatch"},
    {"inpainting": "none"},
    {"inpainting": "convolution"},
    {"merge_levels": 0},
]


def eager(model, batch):
    """Reconstruct with the model's own modules."""
    with torch.no_grad():
        return model.eval()(batch, teacher=False).student


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: "-".join(changes) or "simsid")
def test_folding_changes_only_the_rounding(changes):
    model = lively(**changes).double()
    batch = images(16).double()
    frozen = freeze(model)
    assert (frozen.outputs(batch)["reconstruction"] - eager(model, batch)).abs().max() < 1e-12
    folded = [*frozen.encoder.modules(), *frozen.student.modules()]
    kept = [module for module in folded if isinstance(module, nn.BatchNorm2d)]
    assert not kept
    assert [module for module in frozen.discriminator.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not hasattr(frozen, "teacher")


def test_signals_of_model_and_frozen_copy_are_equal_bit_for_bit():
    model, batch = lively(), images(5)
    model.calibrate(batch)
    frozen = model.freeze()
    assert frozen.signal_names == model.signal_names and frozen.preprocessing == model.preprocessing
    found = frozen.signals(batch)
    for name, values in model.signals(batch).items():
        np.testing.assert_array_equal(found[name], values)
    assert torch.equal(frozen.score(batch), model.score(batch))
    assert torch.equal(frozen.reconstruct(batch), model.reconstruct(batch))
    for name in model.map_names:
        assert torch.equal(frozen.maps(batch, name), model.maps(batch, name))
    assert frozen.freeze() is frozen and freeze(frozen) is frozen


def test_freezing_leaves_the_model_alone():
    model = lively().train()
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.named_parameters()}
    for share in (False, True):
        FrozenModel(model, share=share)
    for name, value in model.named_parameters():
        assert value.data_ptr() == before[name][0] and torch.equal(value, before[name][1])
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.training and isinstance(model.encoder.down[0].entry[1], nn.BatchNorm2d)
    assert model(images(2)).student.requires_grad


def test_frozen_copy_has_weights_of_its_own_that_need_no_gradient():
    model, batch = lively(), images(2)
    frozen = freeze(model)
    own = {parameter.data_ptr() for parameter in [*model.parameters(), *model.buffers()]}
    assert not own & {tensor.data_ptr() for tensor in [*frozen.parameters(), *frozen.buffers()]}
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    before = frozen.reconstruct(batch)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert torch.equal(frozen.reconstruct(batch), before)


def scale_weight_data(model):
    """Through `.data`, which no version counter sees."""
    model.encoder.down[0].inner[0].weight.data.mul_(1.1)


def shift_running_mean(model):
    model.encoder.entry.entry[1].running_mean.add_(0.1)


def scale_memory(model):
    with torch.no_grad():
        model.student.inpainting.memory.items.mul_(1.5)


def assign_state(model):
    other = {name: value.clone() for name, value in model.state_dict().items()}
    other["encoder.down.0.inner.0.weight"] *= 1.1
    model.load_state_dict(other, assign=True)


def wrap_output(model):
    model.student.output = nn.Sequential(model.student.output, nn.Tanh())


def parametrize_convolution(model):
    nn.utils.parametrizations.weight_norm(model.student.up[0].inner[0])
    with torch.no_grad():
        model.student.up[0].inner[0].parametrizations.weight.original0.mul_(1.1)


@pytest.mark.parametrize(
    "change",
    [scale_weight_data, shift_running_mean, scale_memory, assign_state, wrap_output, parametrize_convolution],
)
def test_scores_of_a_model_follow_every_change_of_it(change):
    model, batch = lively(), images(16)
    before = model.reconstruct(batch)
    change(model)
    after = model.reconstruct(batch)
    assert (after - eager(model, batch)).abs().max() < 2e-5
    assert (after - before).abs().max() > 1e-4


def test_inference_mode_around_a_call_does_not_affect_the_next():
    model, batch = lively(), images(16)
    with torch.inference_mode():
        model.signals(batch)
        assert model.reconstruct(batch).shape == batch.shape
    scale_memory(model)
    assert (model.reconstruct(batch) - eager(model, batch)).abs().max() < 2e-5
    assert eager(model.train(), batch).shape == batch.shape


def test_model_made_in_inference_mode_scores():
    with torch.inference_mode():
        model = lively()
        scale_memory(model)
    assert (model.reconstruct(images(16)) - eager(model, images(16))).abs().max() < 2e-5


def test_autocast_around_a_call_changes_no_score():
    """Scores are compared with those of a calibration, in whatever context it was made."""
    model = lively()
    plain = model.signals(images(2))
    with torch.autocast("cpu", torch.bfloat16):
        surrounded = model.signals(images(2))
    assert all(np.array_equal(plain[name], surrounded[name]) for name in plain)


def test_hooks_run_and_what_they_hold_is_not_copied(tmp_path):
    model, seen = lively(), []

    class Recorder:
        def __init__(self, file):
            self.file = file

        def hook(self, module, *_):
            seen.append(module.training)

    with open(tmp_path / "log", "w") as cannot_be_copied:
        model.student.register_forward_hook(Recorder(cannot_be_copied).hook)
        model.train().signals(images(2))
    assert seen == [False]


def test_compiled_parts_are_scored_eagerly():
    model = lively()
    expected = model.train().reconstruct(images(16))
    model.student._compiled_call_impl = lambda *_: pytest.fail("this calls the student in training mode")
    assert torch.equal(model.reconstruct(images(16)), expected)


def test_copies_and_files_score_alike(tmp_path):
    model = lively()
    duplicate, frozen = copy.deepcopy(model), copy.deepcopy(freeze(model))
    model.save(tmp_path)
    for other in (duplicate, frozen, Model.load(tmp_path)):
        assert torch.equal(other.reconstruct(images(2)), model.reconstruct(images(2)))


def test_results_are_independent_of_later_calls():
    frozen = freeze(lively())
    first = frozen.reconstruct(images(2))
    kept = first.clone()
    frozen.reconstruct(images(2, seed=5))
    assert torch.equal(first, kept)


def test_frozen_model_exports_with_any_batch_size():
    """`torch.export` of the forward pass alone: shapes come from the tensors, and no batch size is built in."""
    model = lively()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (images(4),), {"teacher": False}, dynamic_shapes=({0: batch}, None))
    for count in (2, 7):
        found = program.module()(images(count), teacher=False)
        torch.testing.assert_close(found.student, eager(model, images(count)))
