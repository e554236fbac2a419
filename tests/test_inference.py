"""The form in which a model scores: the same function as the model itself, following its weights."""

import copy

import pytest
import tiny
import torch
from test_model import images, lively
from torch import nn

from simsid import Model
from simsid.inference import InferenceForm

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


@pytest.mark.parametrize(
    "change",
    [changed_in_place, changed_statistics, changed_memory, changed_unnoticed, changed_dtype, changed_assigned],
)
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
    if change in (changed_in_place, changed_statistics, changed_memory, changed_unnoticed):
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_replayed_inference_is_the_eager_one():
    model = tiny.model().cuda().eval()
    batch = tiny.images(16).cuda()
    replayed = model.signals(batch)
    assert model._form._replays
    changed_in_place(model)
    moved = model.signals(batch)
    eager = InferenceForm(model)
    eager._record = False
    with torch.no_grad():
        plainly = eager.signals(batch, model.signal_names)
    for name, values in moved.items():
        torch.testing.assert_close(torch.from_numpy(values), plainly[name].double().cpu(), rtol=1e-4, atol=1e-5)
    assert not torch.equal(torch.from_numpy(moved["residual"]), torch.from_numpy(replayed["residual"]))
