"""The images and other objects that a trainer accepts, and what it measures of them after an epoch."""

import math

import pytest
import tiny
import torch

from simsid import Trainer, TrainingConfig, checkpoint, data
from simsid.distributed import ProcessGroup
from simsid.errors import InputError, InputTypeError
from simsid.training.validation import paste_patches, validate

RAW = [name for name in tiny.model().signal_names if not name.startswith("standardized_")]


def fit(model, images, val=None):
    return Trainer(model, TrainingConfig(batch_size=4, epochs=1)).fit(images, val)


def test_validation_leaves_out_nonfinite_signals():
    model = tiny.model()
    with torch.no_grad():
        model.discriminator.output.bias.fill_(math.nan)
    result = validate(model, ProcessGroup(), data.as_image_set(tiny.images(3)))
    assert list(result) == ["val_reconstruction", "val_memory_distance"]
    assert all(map(math.isfinite, result.values()))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_pasted_patch_is_a_rectangle_of_the_same_image_in_every_copy(dtype):
    pixels = torch.arange(5 * 48 * 48).view(5, 1, 48, 48)
    pixels = (pixels / pixels.max()) if dtype == torch.float32 else (pixels % 251).to(dtype)
    images = data.ImageSet(pixels, tuple(data.Record(f"{i}", label=0) for i in range(5)))
    pasted = paste_patches(images)
    assert pasted.pixels.dtype == dtype and list(pasted.labels) == [1] * 5 and list(images.labels) == [0] * 5
    for before, after in zip(images.pixels[:, 0].to(torch.float64), pasted.pixels[:, 0].to(torch.float64)):
        rows, columns = (before != after).nonzero().unbind(1)
        height, width = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
        assert 5 <= height <= 20 and 5 <= width <= 20, "15 to 40 % of a side; a repeated value may hide an edge"
        assert set(after.unique().tolist()) <= set(before.unique().tolist()), "nothing new is painted"
    assert torch.equal(paste_patches(images).pixels.to(torch.float64), pasted.pixels.to(torch.float64))


def test_synthetic_criterion_measures_every_signal_against_pasted_patches():
    config = TrainingConfig(batch_size=4, epochs=2, criterion="synthetic")
    history = Trainer(tiny.model(signal=RAW[0]), config).fit(tiny.images(8), tiny.images(6, 1))
    names = [name for name in history.epochs[0] if name.startswith("val_synthetic_")]
    assert names == [f"val_synthetic_{name}" for name in RAW]
    assert not [name for name in history.epochs[0] if name.startswith("val_auc_")], "no anomaly was needed"
    assert history.best_value == max(epoch["val_synthetic_discriminator_per_image"] for epoch in history.epochs)


def test_validation_measures_every_signal():
    images = data.ImageSet(
        torch.randint(0, 256, (6, 1, 48, 48), dtype=torch.uint8),
        tuple(data.Record(str(i), label=label) for i, label in enumerate((0, 0, 0, 1, 1, -1))),
    )
    model = tiny.model()
    history = fit(model, tiny.images(4), images)
    names = [name for name in history.epochs[0] if name.startswith("val_auc_")]
    assert names == [f"val_auc_{name}" for name in (*RAW, model.signal)]
    assert history.best_value == history.epochs[0][f"val_auc_{model.signal}"]


@pytest.mark.parametrize(
    ("images", "val", "error", "message"),
    [
        (
            torch.zeros(4, 1, 32, 32),
            None,
            InputError,
            "train images must be 48 x 48 pixels, as the model's, got 32 x 32",
        ),
        (torch.zeros(4, 1, 48, 48), torch.zeros(2, 1, 48, 32), InputError, "val images must be 48 x 48"),
        (torch.zeros(1, 1, 48, 48), None, InputError, "training needs at least 2 images, got 1"),
        (torch.zeros(4, 3, 48, 48), None, InputError, r"train must have shape \[n, 1, H, W\], got \[4, 3, 48, 48\]"),
        (torch.zeros(4, 1, 48, 48, dtype=torch.uint8), None, InputError, "train must be floating point"),
        (torch.full((4, 1, 48, 48), 3.0), None, InputError, "train must .*-1..1"),
        (["a.png", "b.png"], None, InputTypeError, "the batches of train must be arrays"),
        ("films", None, InputTypeError, "train must be .*, got the path 'films'"),
        (None, None, InputTypeError, "train must be .*, got None"),
        (torch.zeros(4, 1, 48, 48), 5, InputTypeError, "val must be .*, got an object of type int"),
    ],
)
def test_images_that_cannot_be_used_are_one_sentence(images, val, error, message):
    with pytest.raises(error, match=message) as caught:
        fit(tiny.model(), images, val)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": torch.nn.Linear(1, 1)}, "^model must be of type Model, got an object of type Linear$"),
        ({"config": {"epochs": 1}}, "^config must be of type TrainingConfig, got an object of type dict$"),
        ({"run": 7}, "^run must be of type RunFolder or str or PathLike or None, got 7$"),
        ({"group": 2}, "^group must be of type ProcessGroup, got 2$"),
    ],
    ids=["model", "config", "run", "group"],
)
def test_argument_of_a_wrong_type_is_one_sentence(arguments, message):
    with pytest.raises(InputTypeError, match=message):
        Trainer(**{"model": tiny.model(), **arguments})
    with pytest.raises(InputError, match=r"^batch_size must be a whole number, got '4'$"):
        TrainingConfig(batch_size="4")


class Labeled(torch.utils.data.Dataset):
    """Images with labels: the last two are abnormal."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], int(index >= len(self) - 2)


def test_array_dataset_and_loader_train_like_a_tensor():
    images, results = tiny.images(8), []
    sources = [images, images.numpy(), Labeled(images), torch.utils.data.DataLoader(Labeled(images), batch_size=3)]
    for source in sources:
        model = tiny.model()
        fit(model, source)
        results.append(checkpoint.tensors(model))
    for other in results[1:]:
        assert not [name for name, value in results[0].items() if not torch.equal(value, other[name])]
    history = fit(tiny.model(), images, torch.utils.data.DataLoader(Labeled(tiny.images(5, 1)), batch_size=3))
    assert "val_auc_residual" in history.epochs[0], "the labels of a loader are used"
    assert "val_reconstruction" not in fit(tiny.model(), images, images[:0]).epochs[0]
