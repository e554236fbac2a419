"""One image prepared for a model, and streams of files in bounded memory."""

import itertools
import threading
import types

import numpy as np
import pytest
import torch
from sample_files import DEEP, gray, ramp, save

from simsid.data import Preprocessing, load_images, read, stream_images
from simsid.data.images import FAILURES_AT_ONCE
from simsid.errors import InputError, InputTypeError, NonFiniteError, ReadError


def test_read_prepares_files_and_arrays_as_load_images_does(folder, tmp_path):
    deep = save(tmp_path / "deep.png", DEEP)
    preprocessing = Preprocessing(16, "pad", "minmax")
    for path, pixels in ((folder[1], gray(11, 50)), (deep, DEEP)):
        expected = load_images([path], 16, aspect="pad", intensity="minmax").batch([0])
        model = types.SimpleNamespace(preprocessing=preprocessing)
        for source in (path, str(path), pixels, torch.from_numpy(pixels)):
            assert torch.equal(read(source, model), expected)
            assert torch.equal(read(source, preprocessing), expected)
            assert torch.equal(read(source, image_size=16, aspect="pad", intensity="minmax"), expected)
    assert torch.equal(read(DEEP, image_size=40), load_images([deep], 40).batch([0]))


@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.float64])
def test_read_maps_arrays_without_a_display_range_by_their_percentiles(dtype):
    pixels = ramp(40, 50, 1000).astype(dtype) - 500 + np.arange(50).astype(dtype)
    values = read(pixels, image_size=(40, 50))
    assert values.shape == (1, 1, 40, 50) and (values.min(), values.max()) == (-1, 1)
    with pytest.raises(ReadError, match="declare no range"):
        read(pixels, intensity="range")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.zeros((2, 4, 4), np.uint8),), InputError, r"path_or_array must have shape \[H, W\], got \[2, 4, 4\]"),
        ((np.full((4, 4), np.nan),), NonFiniteError, "path_or_array must be finite"),
        ((np.zeros((4, 4), bool),), InputTypeError, "integers or floats, got dtype bool"),
        ((None,), InputTypeError, "must be a path or a 2-D array, got NoneType"),
        ((np.zeros((4, 4)), 128), InputTypeError, "must be a model or a Preprocessing, got int"),
        (("absent.png",), ReadError, "^absent.png: the file cannot be read: No such file"),
    ],
    ids=["three axes", "NaN", "bool", "None", "no model", "absent"],
)
def test_read_refuses_what_it_cannot_prepare(arguments, error, message):
    with pytest.raises(error, match=message):
        read(*arguments)


def test_preprocessing_is_the_options_of_load_images(folder):
    preprocessing = Preprocessing([8, 12], "crop", "minmax")
    assert preprocessing == Preprocessing((8, 12), "crop", "minmax") and preprocessing.size == (8, 12)
    assert torch.equal(
        load_images(folder, **preprocessing.to_dict()).pixels,
        load_images(folder, (8, 12), aspect="crop", intensity="minmax").pixels,
    )
    assert Preprocessing(8).size == (8, 8) and hash(Preprocessing()) == hash(Preprocessing(128, "stretch", "auto"))


def test_read_refuses_options_beside_a_preprocessing():
    with pytest.raises(InputError, match="image_size, aspect and intensity must be left out"):
        read(np.zeros((4, 4)), Preprocessing(), image_size=64)


@pytest.mark.parametrize("workers", [1, 4])
def test_stream_keeps_order_and_reports_every_file_once(folder, workers):
    seen, failed, sizes = [], [], []
    for batch, records, failures in stream_images(folder, 8, workers=workers, batch_size=2):
        assert batch.dtype == torch.float32
        assert batch.shape == (len(records), 1, 8, 8)
        sizes.append(len(records))
        seen += zip([record.path for record in records], batch[:, 0, 0, 0].tolist())
        failed += [failure.path for failure in failures]
    assert sizes == [2, 2, 1]
    assert [path for path, _ in seen] == [str(path) for path in folder if path.name != "2b.png"]
    assert [round((value + 1) * 127.5) for _, value in seen] == [0, 50, 100, 150, 200]
    assert failed == [str(folder[3])]


def test_stream_of_failures_alone_yields_them(tmp_path):
    ((batch, records, failures),) = stream_images([tmp_path / "a.png", tmp_path / "b.png"], 8)
    assert batch.shape == (0, 1, 8, 8)
    assert records == []
    assert [failure.path for failure in failures] == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    assert list(stream_images([], 8)) == []


def test_stream_of_endless_failures_does_not_gather_them_all(folder, tmp_path):
    files = itertools.chain([folder[0]], itertools.repeat(tmp_path / "missing.png"))
    stream = stream_images(files, 8, batch_size=4)
    for first in (1, 0):
        batch, records, failures = next(stream)
        assert batch.shape == (first, 1, 8, 8) and len(records) == first and len(failures) == FAILURES_AT_ONCE
    stream.close()


def test_stream_reads_ahead_by_a_bounded_number_of_files(folder):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield folder[0]

    stream = stream_images(endless(), 8, workers=2, batch_size=3)
    for _ in range(5):
        batch, _, _ = next(stream)
        assert len(batch) == 3
    # What was yielded, one batch and two files a thread ahead, and the one in hand.
    assert 15 <= len(taken) <= 15 + 3 + 2 * 2 + 1
    before = threading.active_count()
    stream.close()
    assert threading.active_count() < before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("simsid-read")]
