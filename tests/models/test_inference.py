"""The form in which a model scores: the same function as the model itself, following its weights."""

import copy

import numpy as np
import pytest
import tiny
import torch
from test_model import images, lively
from torch import nn

from simsid import Model

CHANGES = [
    {},
    {"memory": "queue"},
    {"decoder_memory": "subpatch"},
    {"inpainting": "none"},
    {"inpainting": "convolution"},
    {"merge_levels": 0},
]


def plain(model, batch):
    """What the modules compute as they are."""
    with torch.no_grad():
        return model.eval()(batch, teacher=False).student


@pytest.mark.parametrize("changes", CHANGES)
def test_folding_changes_nothing_but_rounding(changes):
    model = lively(**changes).double()
    batch = images(16).double()
    assert (model.reconstruct(batch) - plain(model, batch)).abs().max() < 1e-12
    norms = [module for part in (model.encoder, model.student) for module in part.modules()]
    norms = [module for module in norms if isinstance(module, nn.BatchNorm2d)]
    assert len(model._form._folded) == len(norms) > 10
    parts = [*model._form.encoder.modules(), *model._form.student.modules()]
    assert not [module for module in parts if isinstance(module, nn.BatchNorm2d)]


def test_weights_are_shared_and_left_alone():
    model = lively()
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    model.signals(images(3))
    form = model._form
    assert form.student.inpainting.memory.items is model.student.inpainting.memory.items
    assert form.discriminator.output.weight is model.discriminator.output.weight
    own = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    new = [
        p for part in (form.encoder, form.student, form.discriminator) for p in part.parameters() if id(p) not in own
    ]
    assert len(new) == 2 * len(form._folded)
    for name, value in model.state_dict().items():
        assert value.data_ptr() == before[name][0] and torch.equal(value, before[name][1])
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(isinstance(block.entry[1], nn.BatchNorm2d) for block in model.encoder.down)
    assert model.train()(images(2)).student.requires_grad


def changed_in_place(model):
    with torch.no_grad():
        model.encoder.down[0].inner[0].weight.mul_(1.1)


def changed_statistics(model):
    model.encoder.entry.entry[1].running_mean.add_(0.1)


def changed_memory(model):
    with torch.no_grad():
        model.student.inpainting.memory.items.mul_(1.5)


def changed_unnoticed(model):
    """As a replayed graph does: in training mode, and no tensor counts it."""
    model.train()
    model.encoder.down[0].inner[0].weight.data.mul_(1.1)
    model.eval()


def changed_dtype(model):
    model.double()


def changed_assigned(model):
    other = {name: value.clone() for name, value in model.state_dict().items()}
    other["encoder.down.0.inner.0.weight"] *= 1.1
    model.load_state_dict(other, assign=True)


def changed_and_said(model):
    """In inference mode, in a way that no tensor counts; `eval` says so."""
    model.encoder.down[0].inner[0].weight.data.mul_(1.1)
    model.eval()


def changed_part_assigned(model):
    other = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    other["down.0.inner.0.weight"] *= 1.1
    model.encoder.load_state_dict(other, assign=True)


def changed_part(model):
    model.student = tiny.model(1).eval().student


def changed_structure(model):
    """Another module around the same weights."""
    model.student.output = nn.Sequential(model.student.output, nn.Tanh())


def changed_precision_of_a_part(model):
    """The weights may come to lie where they were."""
    with torch.no_grad():
        model.encoder.down[0].inner[0].weight.mul_(1.1)
    model.encoder.bfloat16().float()


def changed_to_a_parametrisation(model):
    nn.utils.parametrizations.weight_norm(model.student.up[0].inner[0])
    with torch.no_grad():
        model.student.up[0].inner[0].parametrizations.weight.original0.mul_(1.1)


IN_PLACE = [changed_in_place, changed_statistics, changed_memory, changed_unnoticed, changed_and_said]
ELSEWHERE = [changed_dtype, changed_assigned, changed_part_assigned, changed_part, changed_structure]
ELSEWHERE += [changed_precision_of_a_part, changed_to_a_parametrisation]


@pytest.mark.parametrize("change", [*IN_PLACE, *ELSEWHERE])
def test_scores_follow_the_weights(change):
    model, batch = lively(), images(16)
    old = model.reconstruct(batch)
    form = model._form
    assert torch.equal(model.reconstruct(batch), old) and model._form is form, "nothing is made twice"
    change(model)
    new = model.reconstruct(batch)
    dtype = next(model.parameters()).dtype
    assert (new - plain(model, batch.to(dtype))).abs().max() < 2e-5
    assert change is changed_dtype or (new - old).abs().max() > 1e-4
    if change in IN_PLACE:
        assert model._form is form, "recorded graphs stay of use"


def test_inference_mode_around_one_call_is_nothing_to_the_next():
    model, batch = lively(), images(16)
    with torch.inference_mode():
        model.signals(batch)
    for ask in (model.reconstruct, model.signals, torch.inference_mode()(model.reconstruct), model.reconstruct):
        changed_in_place(model)
        ask(batch)
    found = model.reconstruct(batch)
    assert not found.is_inference() and (found - plain(model, batch)).abs().max() < 2e-5


def test_a_model_made_in_inference_mode_scores_too():
    """Its tensors count no changes."""
    with torch.inference_mode():
        model = lively()
        old = model.signals(images(2))["residual"]
        changed_in_place(model)
    found = model.reconstruct(images(16))
    assert (found - plain(model, images(16))).abs().max() < 2e-5
    assert not np.array_equal(model.signals(images(2))["residual"], old)


def test_autocast_moves_no_score():
    """Scores are compared with those of a calibration, whatever surrounded it."""
    model = lively()
    plainly = model.signals(images(2))
    with torch.autocast("cpu", torch.bfloat16):
        surrounded = model.signals(images(2))
    assert all(np.array_equal(plainly[name], surrounded[name]) for name in plainly)


def test_hooks_and_what_they_hold_are_not_copied(tmp_path):
    model, seen = lively(), []

    class Recorder:
        def __init__(self, file):
            self.file = file

        def hook(self, module, *_):
            seen.append(module.training)

    with open(tmp_path / "log", "w") as what_cannot_be_copied:
        model.student.register_forward_hook(Recorder(what_cannot_be_copied).hook)
        model.train().signals(images(2))
    assert seen == [False]


def test_parts_compiled_in_place_score_as_they_are():
    model = lively()
    expected = model.train().reconstruct(images(16))
    model.student._compiled_call_impl = lambda *_: pytest.fail("this calls the student in training mode")
    assert torch.equal(model.reconstruct(images(16)), expected)


def test_scores_in_training_mode_follow_every_step():
    model, batch = lively().train(), images(16)
    for _ in range(2):
        model.encoder.down[0].inner[0].weight.data.mul_(1.1)
        found = model.reconstruct(batch)
        assert model.training and (found - plain(copy.deepcopy(model), batch)).abs().max() < 2e-5


def test_copies_and_files_are_the_model_alone(tmp_path):
    model = lively()
    names = list(model.state_dict())
    model.signals(images(3))
    assert list(model.state_dict()) == names and len(list(model.modules())) == len(list(lively().modules()))
    twin = copy.deepcopy(model)
    assert twin._form is None and torch.equal(twin.reconstruct(images(2)), model.reconstruct(images(2)))
    model.save(tmp_path)
    assert torch.equal(Model.load(tmp_path).reconstruct(images(2)), model.reconstruct(images(2)))


def test_results_are_the_callers_own():
    model = lively()
    first = model.reconstruct(images(2))
    kept = first.clone()
    model.reconstruct(images(2, seed=5))
    assert torch.equal(first, kept)
