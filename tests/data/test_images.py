"""Loading in parallel: values, depth, order, failures, bounded memory."""

import hashlib
import pathlib

import numpy as np
import pytest
import torch
from PIL import Image
from sample_files import DEEP, grays, ramp, save, write_dicom
from torch.utils.data import DataLoader

import simsid.data.files
from simsid.data import DecodedImage, Failure, ImageSet, Preprocessing, Record, load_images, stream_images
from simsid.data.reading import read_image
from simsid.errors import InputError, InputTypeError


@pytest.mark.parametrize("workers", [1, 2, 7, None])
def test_load_keeps_the_order_and_collects_failures(folder, workers):
    images = load_images(folder, 16, workers=workers)
    assert images.pixels.shape == (5, 1, 16, 16)
    assert images.pixels.dtype == torch.uint8
    assert grays(images) == [0, 50, 100, 150, 200]
    assert images.paths == [str(path) for path in folder if path.name != "2b.png"]
    (failure,) = images.failures
    assert isinstance(failure, Failure)
    assert failure.path.endswith("2b.png")
    assert "PNG" in failure.reason


def test_load_keeps_records_with_their_labels_and_findings(folder):
    records = [Record(str(folder[1]), "val", 1, "mass", "p"), Record(str(folder[0]))]
    images = load_images(records)
    assert images.records == tuple(records)
    assert images.labels.tolist() == [1, -1]
    assert images.labels.dtype == np.int64
    assert images.findings == ["mass", ""]
    assert images.image_size == (128, 128)
    assert len(images) == 2


def test_load_raises_when_every_file_fails_or_there_is_none(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"none of the 2 files could be read; the first, .*a\.png: the file is not a"):
        load_images([tmp_path / "a.png", tmp_path / "b.png"])
    with pytest.raises(ValueError, match="records must name at least one image, got none"):
        load_images([])


def test_unexpected_error_becomes_a_failure_of_its_file(folder, monkeypatch):
    def read(file, **options):
        image = read_image(file, **options)
        if image.pixels[0, 0] == 150:
            raise RuntimeError("odd\nthing")
        return image

    monkeypatch.setattr(simsid.data.files, "read_image", read)
    images = load_images(folder, 8)
    assert len(images) == 4
    assert images.failures[-1] == Failure(str(folder[4]), "the image cannot be prepared: odd thing")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aspect": "fit"}, "aspect must be one of 'stretch', 'pad', 'crop', got 'fit'"),
        ({"intensity": "zscore"}, "intensity must be one of"),
        ({"image_size": 0}, "image_size"),
        ({"image_size": (8, 8, 8)}, "image_size"),
        ({"image_size": 8.0}, "image_size"),
        ({"workers": 0}, "workers must be at least 1"),
    ],
)
def test_options_are_checked_at_the_call(folder, options, message):
    with pytest.raises(ValueError, match=message):
        load_images(folder, **options)
    with pytest.raises(ValueError, match=message):
        stream_images(folder, **options)


def test_batch_size_is_checked(folder):
    with pytest.raises(ValueError, match="batch_size"):
        stream_images(folder, batch_size=0)


def test_image_set_has_the_depth_of_the_deepest_file(folder, tmp_path):
    deep = save(tmp_path / "deep.png", DEEP)
    mixed = load_images([*folder, deep], 16)
    assert mixed.pixels.dtype == torch.uint16
    assert grays(mixed)[:5] == [257 * value for value in (0, 50, 100, 150, 200)]
    first = load_images([deep, *folder], 16)
    assert grays(first)[1:] == grays(mixed)[:5]
    assert grays(first)[0] == grays(mixed)[5]


def test_values_are_bitwise_equal_at_both_depths_and_in_the_stream(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.uint8)
    shallow, deep = save(tmp_path / "a.png", noise), save(tmp_path / "b.png", DEEP)
    alone = load_images([shallow], 32)
    mixed = load_images([shallow, deep], 32)
    assert (alone.pixels.dtype, mixed.pixels.dtype) == (torch.uint8, torch.uint16)
    assert torch.equal(alone.batch([0]), mixed.batch([0]))
    streamed = torch.cat([batch for batch, _, _ in stream_images([shallow, deep], 32, batch_size=1)])
    assert torch.equal(streamed, mixed.batch([0, 1]))


def test_both_ends_are_exact_and_all_values_distinct():
    records = tuple(Record(str(i)) for i in range(256))
    eight = ImageSet(torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1), records)
    values = eight.batch(slice(None)).flatten()
    assert values[0] == -1
    assert values[255] == 1
    assert (values.diff() > 0).all()
    assert torch.allclose(values, torch.arange(256) / 127.5 - 1, atol=1e-7)
    wide = torch.from_numpy(np.arange(65536, dtype=np.uint16)).view(1, 1, 256, 256)
    values = ImageSet(wide, records[:1]).batch([0]).flatten()
    assert (values[0], values[-1]) == (-1, 1)
    assert (values.diff() > 0).all()


def test_sixteen_bits_survive_from_file_to_image_set(tmp_path):
    narrow = (ramp(64, 64, 1000).astype(np.uint16) + 30000).astype(np.uint16)
    narrow[:, :32] += np.arange(64, dtype=np.uint16)[:, None]
    for name in ("a.png", "a.tif"):
        path = save(tmp_path / name, narrow)
        pixels = load_images([path], 64).pixels.to(torch.int64)
        assert len(pixels.unique()) > 256
        assert pixels.min() == 0
        assert pixels.max() == 65535
        # The order of the gray values is that of the file, up to the pixels clipped at either end.
        inside = (pixels[0, 0] > 0) & (pixels[0, 0] < 65535)
        assert inside.float().mean() > 0.9
        expected = torch.from_numpy(narrow.astype(np.int64))[inside]
        fit = np.polyfit(expected.numpy(), pixels[0, 0][inside].numpy(), 1)
        assert np.abs(np.polyval(fit, expected) - pixels[0, 0][inside].numpy()).max() <= 1


def test_auto_is_the_full_range_for_eight_bits(tmp_path):
    path = save(tmp_path / "a.png", np.tile(np.array([100, 120], np.uint8), (8, 4)))
    assert sorted(load_images([path], 8).pixels.unique().tolist()) == [100, 120]
    assert sorted(load_images([path], 8, intensity="range").pixels.unique().tolist()) == [100, 120]
    assert sorted(load_images([path], 8, intensity="minmax").pixels.unique().tolist()) == [0, 255]


def test_auto_ignores_a_few_hot_pixels_of_deep_files(tmp_path):
    pixels = ramp(100, 100, 3000, np.uint16)
    clean = load_images([save(tmp_path / "a.png", pixels)], 100).pixels.to(torch.int64)
    pixels[50, :4] = 65535
    path = save(tmp_path / "b.png", pixels)
    hot = load_images([path], 100).pixels.to(torch.int64)
    assert (hot - clean)[0, 0, :50].abs().max() < 700
    assert hot[0, 0, 50, 0] == 65535
    assert load_images([path], 100, intensity="minmax").pixels.to(torch.int64).float().median() < 4000
    kept = load_images([path], 100, intensity="range").pixels[0, 0].numpy()
    assert np.array_equal(kept, pixels)


def test_dicom_uses_its_window_and_else_percentiles(tmp_path):
    pixels = ramp(40, 40, 4095, np.uint16)
    twelve = {"BitsStored": 12, "HighBit": 11}
    windowed = write_dicom(tmp_path / "a", pixels, WindowCenter=2048, WindowWidth=8192, **twelve)
    bare = write_dicom(tmp_path / "b", pixels // 2 + 500, **twelve)
    images = load_images([windowed, bare], 40)
    values = images.batch(slice(None))
    assert images.pixels.dtype == torch.uint16
    # The window is wider than the values, so they stay in the middle half.
    assert -0.51 < values[0].min() < -0.49
    assert 0.49 < values[0].max() < 0.51
    assert values[1].min() == -1
    assert values[1].max() == 1
    ranged = load_images([bare], 40, intensity="range").pixels.to(torch.int64)
    assert ranged.max() == round((4095 // 2 + 500) / 4095 * 65535)


def test_monochrome1_is_the_inverse_of_monochrome2(tmp_path):
    pixels = ramp(30, 30, 4095, np.uint16)
    for window in ({}, {"WindowCenter": 2000, "WindowWidth": 1500}):
        paths = [
            write_dicom(tmp_path / kind, pixels, PhotometricInterpretation=kind, BitsStored=12, HighBit=11, **window)
            for kind in ("MONOCHROME1", "MONOCHROME2")
        ]
        one, two = load_images(paths, 30).batch(slice(None))
        assert (one + two).abs().max() < 5e-5
        assert one[0, 0, 0] > 0.9


def test_range_needs_a_declared_range(tmp_path):
    path = save(tmp_path / "a.tif", ramp().astype(np.float32))
    assert load_images([path], 8).pixels.dtype == torch.uint16
    with pytest.raises(ValueError, match="32-bit samples declare no range"):
        load_images([path], 8, intensity="range")


@pytest.mark.parametrize("intensity", ["auto", "minmax"])
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_constant_images_without_a_display_range_are_black(dtype, intensity):
    image = DecodedImage(np.full((9, 9), 1234, dtype), None, for_display=False, bits=16, format="")
    assert not Preprocessing(8, intensity=intensity).quantize(image).any()


def test_two_valued_deep_images_keep_both(tmp_path):
    pixels = np.full((100, 100), 500, np.uint16)
    pixels[0, :3] = 900
    values = load_images([save(tmp_path / "a.png", pixels)], 100).batch([0])
    assert values.unique().tolist() == [-1, 1]


def test_stretch_fills_pad_surrounds_and_crop_cuts(tmp_path):
    # 20 rows and 40 columns, white, the outer ten columns on either side gray.
    pixels = np.full((20, 40), 255, np.uint8)
    pixels[:, :10] = pixels[:, 30:] = 128
    path = save(tmp_path / "a.png", pixels)
    stretch = load_images([path], 20).pixels[0, 0]
    assert (stretch[:, :4] == 128).all()
    assert (stretch[:, 8:12] == 255).all()
    pad = load_images([path], 20, aspect="pad").pixels[0, 0]
    assert (pad[:5] == 0).all()
    assert (pad[15:] == 0).all()
    assert torch.equal(pad[5:15, 7:13], torch.full((10, 6), 255, dtype=torch.uint8))
    assert (pad[5:15, :4] == 128).all()
    crop = load_images([path], 20, aspect="crop").pixels[0, 0]
    assert (crop == 255).all()
    upright = save(tmp_path / "b.png", np.ascontiguousarray(pixels.T))
    assert torch.equal(load_images([upright], 20, aspect="crop").pixels[0, 0], crop)
    assert torch.equal(load_images([upright], 20, aspect="pad").pixels[0, 0], pad.T)


@pytest.mark.parametrize("aspect", ["stretch", "pad", "crop"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 900), (777, 3), (33, 34)])
def test_any_shape_fits_any_size(aspect, shape):
    image = DecodedImage(np.full(shape, 200, np.uint8), (0.0, 255.0), for_display=True, bits=8, format="")
    pixels = Preprocessing((24, 40), aspect).quantize(image)
    assert pixels.shape == (24, 40) and pixels.max() == 200
    assert pixels.min() == (200 if aspect != "pad" else 0)


def test_resizing_does_not_alias(tmp_path):
    stripes = np.tile(np.array([0, 255], np.uint8), (512, 256))
    pixels = load_images([save(tmp_path / "a.png", stripes)], 100).pixels.float()
    assert (pixels - 127.5).abs().max() < 12
    assert np.abs(stripes[:, ::5].astype(float) - 127.5).max() > 127


def test_the_same_size_changes_nothing(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (33, 47)).astype(np.uint8)
    for aspect in ("stretch", "pad", "crop"):
        pixels = load_images([save(tmp_path / "a.png", noise)], (33, 47), aspect=aspect).pixels
        assert np.array_equal(pixels[0, 0].numpy(), noise)


def test_batch_takes_every_kind_of_index(folder):
    images = load_images(folder, 8)
    expected = torch.tensor([50, 200]) / 127.5 - 1
    for index in (
        [1, 4],
        torch.tensor([1, 4]),
        np.array([1, 4]),
        slice(1, 5, 3),
        torch.tensor([False, True, False, False, True]),
        np.array([False, True, False, False, True]),
        [1, -1],
    ):
        batch = images.batch(index)
        assert batch.dtype == torch.float32
        assert batch.shape == (2, 1, 8, 8)
        assert torch.allclose(batch[:, 0, 0, 0], expected)
    assert images.batch([]).shape == (0, 1, 8, 8)
    assert images.batch([3, 3, 0])[:, 0, 0, 0].tolist() == images.batch([3, 0])[[0, 0, 1], 0, 0, 0].tolist()
    for wrong, error in (([9], IndexError), ([0.5], ValueError), ([True], ValueError), (2, ValueError)):
        with pytest.raises(error):
            images.batch(wrong)


@pytest.mark.parametrize("deep", [False, True])
def test_select(folder, tmp_path, deep):
    files = [*folder, save(tmp_path / "z.png", DEEP)] if deep else folder
    images = load_images(files, 8)
    some = images.select(np.array([4, 0]))
    assert some.paths == [images.paths[4], images.paths[0]]
    assert some.pixels.dtype == images.pixels.dtype
    assert torch.equal(some.batch(slice(None)), images.batch([4, 0]))
    assert some.failures == ()
    assert len(images.select(images.labels == 1)) == 0


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"records": (Record("a"),)}, "records must be one for each image, got 1 for 2"),
        ({"sha256": ("",)}, "sha256 must be one for each image, got 1 for 2"),
        ({"pixels": torch.zeros(2, 1, 4, 4, dtype=torch.int32)}, "uint8 or uint16, or float32 in -1..1, got torch.int"),
        ({"pixels": torch.zeros(2, 4, 4, dtype=torch.uint8)}, r"shape \[n, 1, H, W\], got \[2, 4, 4\]"),
        ({"pixels": torch.full((2, 1, 4, 4), 255.0)}, "pixels must lie in -1..1, .* got 255 to 255"),
    ],
    ids=["records", "hashes", "dtype", "shape", "range"],
)
def test_image_set_refuses_parts_that_do_not_fit(parts, message):
    fitting = {"pixels": torch.zeros(2, 1, 4, 4, dtype=torch.uint8), "records": (Record("a"), Record("b"))}
    with pytest.raises(InputError, match=message):
        ImageSet(**{**fitting, **parts})


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
@pytest.mark.parametrize("workers", [0, 2])
def test_image_set_gives_the_same_batches_through_a_data_loader(dtype, workers):
    records = tuple(Record(str(i), label=label) for i, label in enumerate((0, 1, None)))
    pixels = torch.tensor([0, 1, 0.5]) if dtype.is_floating_point else torch.tensor([0, 255, 7], dtype=torch.int32)
    images = ImageSet(pixels.to(dtype).view(3, 1, 1, 1).expand(3, 1, 4, 6).clone(), records)
    image, label = images[-1]
    assert (image.shape, image.dtype, label.dtype) == ((1, 4, 6), torch.float32, torch.int64)
    batches = list(DataLoader(images, batch_size=2, num_workers=workers))
    assert torch.equal(torch.cat([batch for batch, _ in batches]), images.batch(slice(None)))
    assert torch.cat([labels for _, labels in batches]).tolist() == images.labels.tolist() == [0, 1, -1]
    assert len(list(images)) == 3
    with pytest.raises(IndexError):
        images[3]


def test_float_images_keep_their_values():
    pixels = torch.linspace(-1, 1, 32).view(2, 1, 4, 4)
    images = ImageSet(pixels, (Record("a"), Record("b")), sha256=("x", "y"))
    assert torch.equal(images.batch([1, 0]), pixels[[1, 0]])
    assert torch.equal(torch.cat(list(images.batches(1))), pixels)
    assert images.select([1]).sha256 == ("y",)


def test_each_file_is_opened_once_and_hashed_from_the_decoded_bytes(folder, monkeypatch):
    opened = []
    open_file = simsid.data.files.open_file
    monkeypatch.setattr(simsid.data.files, "open_file", lambda path: opened.append(path) or open_file(path))
    images = load_images(folder, 8)
    assert sorted(opened) == sorted(map(str, folder))
    files = [*images.paths, images.failures[0].path]
    hashes = [*images.sha256, images.failures[0].sha256]
    assert hashes == [hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest() for file in files]
    assert images.select([2]).sha256 == images.sha256[2:3]


@pytest.mark.parametrize("function", [load_images, stream_images])
@pytest.mark.parametrize("wrong", ["folder", pathlib.Path("folder"), None, 3, Record("a")])
def test_single_paths_and_other_objects_are_refused_as_records(function, wrong):
    with pytest.raises(InputTypeError, match=r"records must be a list of records or paths, got .*open_dataset"):
        function(wrong)
    with pytest.raises(InputTypeError, match="got an item of type int"):
        list(function([3]))


def test_max_pixels_is_passed_on(folder):
    images = load_images(folder, 8, max_pixels=11 * 14)
    assert [failure.reason for failure in images.failures][-1] == (
        "the header says 14 x 14 pixels, more than the 0.000154 million allowed"
    )
    assert len(images) == 2


def test_progress_shows_a_bar(folder, capfd):
    load_images(folder, 8, progress=True)
    assert "reading" in capfd.readouterr().err
    load_images(folder, 8)
    assert capfd.readouterr() == ("", "")


def test_sixteen_bit_copy_of_an_eight_bit_image_is_equal_with_range(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (50, 50)).astype(np.uint8)
    paths = [save(tmp_path / "a.png", noise), save(tmp_path / "b.png", noise.astype(np.uint16) * 257)]
    values = load_images(paths, 50, intensity="range").batch([0, 1])
    assert torch.equal(values[0], values[1])
    Image.open(paths[1]).close()
