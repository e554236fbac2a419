"""Arrays, data sets, loaders and iterables as batches and as one image set."""

import warnings

import numpy as np
import pytest
import torch
from sample_files import ramp, save
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from simsid.data import DigitAnatomy, ImageSet, Preprocessing, Radiographs, Record, as_batches, as_image_set
from simsid.errors import InputError, InputTypeError, NonFiniteError, ReadError

IMAGES = torch.linspace(-1, 1, 7 * 6 * 4).view(7, 1, 6, 4)
LABELS = torch.tensor([0, 1, -1, 0, 1, 0, 0])


class Listed(torch.utils.data.Dataset):
    """A map-style data set of any items."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class Streamed(IterableDataset):
    """An iterable data set of images alone."""

    def __iter__(self):
        return iter(IMAGES)


def eager(images):
    yield from images.split(3)


UNLABELED = {
    "tensor": lambda: IMAGES,
    "float64": lambda: IMAGES.double(),
    "array": lambda: IMAGES.numpy(),
    "read-only array": lambda: np.broadcast_to(IMAGES.numpy(), IMAGES.shape),
    "reversed array": lambda: np.ascontiguousarray(IMAGES.numpy()[::-1])[::-1],
    "image set": lambda: ImageSet(IMAGES, tuple(Record(str(i)) for i in range(7))),
    "data set of images": lambda: Listed(list(IMAGES)),
    "iterable data set": Streamed,
    "list of batches": lambda: list(IMAGES.split(2)),
    "list of arrays": lambda: [part.numpy() for part in IMAGES.split(5)],
    "generator": lambda: eager(IMAGES),
    "loader of images": lambda: DataLoader(Listed(list(IMAGES)), 3),
    "loader of a stream": lambda: DataLoader(Streamed(), 4),
}
LABELED = {
    "image set": lambda: ImageSet(
        IMAGES, tuple(Record(str(i), label=None if label < 0 else label) for i, label in enumerate(LABELS.tolist()))
    ),
    "tensor data set": lambda: TensorDataset(IMAGES, LABELS),
    "data set of dicts": lambda: Listed([{"image": i, "label": n} for i, n in zip(IMAGES, LABELS)]),
    "data set with further values": lambda: Listed([(i, int(n), "path") for i, n in zip(IMAGES, LABELS)]),
    "loader": lambda: DataLoader(TensorDataset(IMAGES, LABELS), 4),
    "subset": lambda: Subset(TensorDataset(torch.cat([IMAGES, IMAGES]), torch.cat([LABELS, LABELS])), range(7, 14)),
    "loader of dicts": lambda: DataLoader(Listed([{"image": i, "label": n} for i, n in zip(IMAGES, LABELS)]), 4),
    "pairs": lambda: zip(IMAGES.split(3), LABELS.split(3)),
}


@pytest.mark.parametrize("size", [1, 3, 7, 256])
@pytest.mark.parametrize("kind", UNLABELED)
def test_every_source_gives_the_same_batches(kind, size):
    batches = list(as_batches(UNLABELED[kind](), size))
    assert [len(batch) for batch in batches] == [len(part) for part in IMAGES.split(size)]
    assert all(batch.dtype == torch.float32 for batch in batches)
    assert torch.equal(torch.cat(batches), IMAGES)


@pytest.mark.parametrize("kind", LABELED)
def test_labels_reach_the_image_set_and_are_dropped_from_batches(kind):
    images = as_image_set(LABELED[kind]())
    assert torch.equal(images.batch(slice(None)), IMAGES)
    assert images.labels.tolist() == LABELS.tolist()
    assert torch.equal(torch.cat(list(as_batches(LABELED[kind](), 2))), IMAGES)


@pytest.mark.parametrize("kind", sorted(UNLABELED.keys() - {"image set"}))
def test_images_without_labels_get_the_given_one(kind):
    assert as_image_set(UNLABELED[kind]()).labels.tolist() == [-1] * 7
    images = as_image_set(UNLABELED[kind](), label=0, name="train")
    assert images.labels.tolist() == [0] * 7 and images.paths[6] == "train/6"


def test_image_set_and_float32_tensor_are_not_copied():
    images = as_image_set(IMAGES)
    assert images.pixels.data_ptr() == IMAGES.data_ptr()
    assert as_image_set(images) is images


def test_data_sets_of_files_are_decoded_as_asked(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png", ramp(20, 30, 100 + i))
    dataset = Radiographs(tmp_path, preprocessing=Preprocessing(16, "pad"))
    expected = dataset.load(image_size=16, aspect="pad").batch(slice(None))
    assert torch.equal(as_image_set(dataset).batch(slice(None)), expected)
    assert as_image_set(dataset).paths == [record.path for record in dataset.records]
    assert as_image_set(dataset, preprocessing=Preprocessing(8)).image_size == (8, 8)
    assert torch.equal(torch.cat(list(as_batches(dataset, 2))), expected)
    assert torch.equal(torch.cat([images for images, _ in DataLoader(dataset, 2, num_workers=2)]), expected)
    (tmp_path / "1.png").write_bytes(b"broken")
    with pytest.raises(ReadError, match=r"1 of 3 files could not be read; the first, .*1\.png: the file is not"):
        list(as_batches(dataset))
    with pytest.raises(ReadError, match=r"1\.png: the file is not"):
        dataset[1]
    with pytest.warns(UserWarning, match=r"1 of 3 files could not be read; the first, .*1\.png"):
        assert len(as_image_set(dataset)) == 2


def test_digits_are_a_data_set_of_images_and_labels():
    dataset = DigitAnatomy(train=2, val=1, test_normal=1, test_anomalous=1)
    image, label = dataset[-1]
    assert image.shape == (1, 96, 96) and label == 1
    images = as_image_set(dataset)
    assert torch.equal(images[5][0], image) and images.labels.tolist() == [0, 0, 0, 1, 0, 1]
    assert torch.equal(torch.cat(list(as_batches(dataset, 4))), images.batch(slice(None)))


@pytest.mark.parametrize("function", [as_batches, as_image_set])
@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (None, InputTypeError, "images must be a float array .*, got None"),
        (3, InputTypeError, "images must be .*, got an object of type int"),
        ({"image": IMAGES}, InputTypeError, "images must be .*, got an object of type dict"),
        ("folder", InputTypeError, "images must be .*, got the path 'folder'; use simsid.data.open_dataset"),
        (["a.png"], InputTypeError, "batches of images must be arrays, .*, got str"),
        (Listed(["a.png"]), InputTypeError, "items of images must be arrays, .*, got str"),
        (torch.utils.data.Dataset(), InputTypeError, "images must be a Dataset with a length, got Dataset"),
        (IMAGES[0], InputError, r"images must have shape \[n, 1, H, W\], got \[1, 6, 4\]"),
        (IMAGES[:, 0], InputError, r"images must have shape \[n, 1, H, W\], got \[7, 6, 4\]"),
        (IMAGES.expand(7, 3, 6, 4), InputError, r"\[n, 1, H, W\], got \[7, 3, 6, 4\]"),
        (list(IMAGES), InputError, r"images must have shape \[n, 1, H, W\], got \[1, 6, 4\]"),
        (Listed([IMAGES]), InputError, r"images must have shape \[1, H, W\] each, got \[7, 1, 6, 4\]"),
        (torch.zeros(1, 1, 0, 4), InputError, r"got \[1, 1, 0, 4\]"),
        ([IMAGES, torch.zeros(1, 1, 8, 8)], InputError, "images must have one size, got 6 x 4 and 8 x 8 pixels"),
        (IMAGES.to(torch.uint8), InputError, "images must be floating point .* got torch.uint8"),
        (np.zeros((1, 1, 4, 4), np.int64), InputError, "images must be floating point .* got int64"),
        ((IMAGES + 1) * 127.5, InputError, "images must lie in -1..1, .* got 0 to 255; use images / 127.5 - 1"),
        (IMAGES * 1024, InputError, "images must lie in -1..1, .* got -1024 to 1024; simsid.data.read maps"),
        ([IMAGES, IMAGES * 1.01], InputError, "got -1.01 to 1.01"),
        (torch.full((1, 1, 4, 4), torch.nan), NonFiniteError, "images must be finite, got NaN or infinite"),
        (torch.full((1, 1, 4, 4), torch.inf), NonFiniteError, "images must be finite"),
    ],
)
def test_other_objects_and_values_are_refused_in_one_sentence(function, source, error, message):
    with pytest.raises(error, match=message) as caught:
        list(function(source))
    assert "\n" not in str(caught.value)


def test_messages_name_the_argument():
    for function in (as_batches, as_image_set):
        with pytest.raises(InputTypeError, match="holdout must be"):
            function(None, name="holdout")
        with pytest.raises(InputError, match=r"holdout must lie in -1\.\.1"):
            list(function(IMAGES * 2, name="holdout"))


@pytest.mark.parametrize("label", [2, "normal", 0.5])
def test_labels_other_than_normal_abnormal_and_unknown_are_refused(label):
    with pytest.raises(InputError, match="the labels of images must be one of 0, 1 and -1"):
        as_image_set(Listed([(IMAGES[0], label)]))


def test_label_count_must_fit_the_batch():
    with pytest.raises(InputError, match="the labels of images must be one of 0, 1 and -1 for each image"):
        as_image_set([(IMAGES, LABELS[:3])])


def test_no_image_is_refused_for_an_image_set_and_gives_no_batch():
    with pytest.raises(InputError, match="images must hold at least one image, got none"):
        as_image_set([])
    assert list(as_batches(IMAGES[:0])) == list(as_batches([])) == []
    with pytest.raises(InputError, match="size must be at least 1, got 0"):
        as_batches(IMAGES, 0)


def test_values_may_leave_the_range_by_a_rounding_error():
    batch = torch.cat(list(as_batches(IMAGES * 1.0005)))
    assert torch.equal(batch, IMAGES * 1.0005)
    assert next(as_batches(IMAGES.bfloat16())).dtype == torch.float32


@pytest.mark.parametrize("function", [as_batches, as_image_set])
def test_images_scaled_to_zero_and_one_give_a_warning_with_the_remedy(function):
    with pytest.warns(UserWarning, match=r"images lie in 0 to 1, .* use images \* 2 - 1"):
        list(function(((IMAGES + 1) / 2).split(2)))


@pytest.mark.parametrize("function", [as_batches, as_image_set])
def test_bright_images_and_constant_images_give_no_warning(function):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(function([(IMAGES + 1) / 2, IMAGES]))
        list(function(IMAGES.abs().clamp_min(0.03)))
        list(function(torch.zeros(2, 1, 4, 4)))
        list(function(ImageSet(torch.full((1, 1, 4, 4), 255, dtype=torch.uint8), (Record("a"),))))
