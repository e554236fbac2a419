"""SimSID with a module of the user's in the place of the papers' encoder."""

import copy

import numpy as np
import pytest
import tiny
import torch
from torch import nn

import simsid
from simsid import Model, Trainer, TrainingConfig, checkpoint
from simsid.errors import CheckpointError, InputError, InputTypeError


class Pyramid(nn.Module):
    """A convolution, and one of stride 2 for each level: the maps of `tiny.SIZES`, 4, 8 and 16 channels."""

    def __init__(self, channels=(4, 8, 16), form=list):
        super().__init__()
        self.form = form
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 1 if i == 0 else 2, 1), nn.BatchNorm2d(b), nn.ReLU())
            for i, (a, b) in enumerate(zip((1, *channels), channels))
        )

    def forward(self, x):
        maps = []
        for layer in self.layers:
            x = layer(x)
            maps.append(x)
        return dict(enumerate(maps)) if self.form is dict else self.form(maps)


def build(**options):
    torch.manual_seed(0)
    return Model(encoder=Pyramid(**options), **tiny.SIZES)


@pytest.mark.parametrize("form", [list, tuple, dict])
def test_custom_encoder_takes_the_place_of_the_papers(form):
    model = build(form=form)
    images = tiny.images(3)
    assert model(images, teacher=True).teacher.shape == (3, 1, 48, 48)
    assert model.encoder.network.training, "the check of the shapes must leave the mode as it is"
    assert set(model.signals(images)) == set(tiny.model().signal_names)


def test_custom_encoder_is_trained_saved_and_loaded_again(tmp_path):
    model = build()
    before = {name: value.clone() for name, value in model.encoder.named_parameters()}
    trainer = Trainer(model, TrainingConfig(batch_size=4, epochs=1), run=tmp_path)
    trainer.fit(tiny.images(8), tiny.images(4, 1))
    assert all(not torch.equal(before[name], value) for name, value in model.encoder.named_parameters())
    loaded = simsid.load(tmp_path, encoder=Pyramid())
    assert checkpoint.read_json(tmp_path / "model.json")["encoder"].endswith("test_custom_encoder.Pyramid")
    images = tiny.images(5, 2)
    want, found = model.signals(images), loaded.signals(images)
    assert all(np.array_equal(want[name], found[name]) for name in want)
    assert loaded.identity() == model.identity()


def test_saved_model_names_the_encoder_that_it_lacks(tmp_path):
    model = build()
    model.save(tmp_path / "custom")
    tiny.model().save(tmp_path / "papers")
    with pytest.raises(CheckpointError, match=r"with the encoder .*Pyramid, which is not part of simsid: load it with"):
        simsid.load(tmp_path / "custom")
    with pytest.raises(CheckpointError, match="trained with the papers' encoder: load it without encoder="):
        simsid.load(tmp_path / "papers", encoder=Pyramid())
    with pytest.raises(CheckpointError, match=r"must have shape|lacks"):
        simsid.load(tmp_path / "custom", encoder=nn.Sequential(copy.deepcopy(model.encoder.network)))


@pytest.mark.parametrize(
    ("encoder", "error", "message"),
    [
        ("resnet18", InputTypeError, r"encoder must be a torch\.nn\.Module, got str"),
        (Pyramid((4, 8)), InputError, r"maps of the shapes \[\[1, 4, 24, 24\], \[1, 8, 12, 12\], \[1, 16, 6, 6\]\]"),
        (Pyramid((4, 8, 12)), InputError, r"for a patch \[1, 1, 24, 24\], got .*\[1, 12, 6, 6\]\]$"),
        (nn.Identity(), InputError, "got Tensor"),
    ],
    ids=["no module", "too few maps", "other channels", "no list"],
)
def test_encoder_that_does_not_fit_is_refused_in_one_sentence(encoder, error, message):
    with pytest.raises(error, match=message):
        Model(encoder=encoder, **tiny.SIZES)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (nn.Conv2d(3, 4, 3), r"encoder must take a float32 patch \[1, 1, \d+, \d+\], and raised: Given groups=1"),
        (Pyramid().double(), "encoder must take a float32 patch"),
        (Pyramid(form=lambda maps: [x.half() for x in maps]), "encoder must yield float32 maps, got torch.float16"),
    ],
    ids=["three channels", "double precision", "half maps"],
)
def test_encoder_that_cannot_take_a_patch_is_refused(encoder, message):
    with pytest.raises(InputError, match=message):
        Model(encoder=encoder, **tiny.SIZES)
