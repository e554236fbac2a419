"""Published layouts, any folder, CSV lists, and telling them apart."""

import os

import numpy as np
import pytest
from sample_files import ramp, save, write_dicom
from shared import ZHANGLAB, needs_zhanglab

from simsid.data import (
    CheXpert,
    COVIDx,
    Failure,
    Preprocessing,
    Radiographs,
    Record,
    ZhangLab,
    iter_records,
    load_images,
    open_dataset,
    scan,
)
from simsid.errors import InputError


def relative(dataset, folder):
    return [os.path.relpath(record.path, folder).replace(os.sep, "/") for record in dataset.records]


def test_radiographs_are_found_at_any_depth_by_content_or_extension(tmp_path):
    save(tmp_path / "b.PNG", ramp())
    save(tmp_path / "deep/er/a.jpeg", ramp())
    write_dicom(tmp_path / "deep/IM0001", ramp())
    write_dicom(tmp_path / "DICOMDIR", ramp())
    save(tmp_path / ".hidden.png", ramp())
    save(tmp_path / ".hidden/c.png", ramp())
    save(tmp_path / "__MACOSX/d.png", ramp())
    (tmp_path / "broken.tif").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no image")
    dataset = Radiographs(tmp_path)
    assert relative(dataset, tmp_path) == ["b.PNG", "broken.tif", "deep/IM0001", "deep/er/a.jpeg"]
    assert {(record.split, record.label, record.finding, record.patient) for record in dataset.records} == {
        ("", None, "", "")
    }
    images = dataset.load(image_size=16)
    assert len(images) == 3
    assert images.failures[0].reason == "the file is empty"


def test_radiographs_takes_splits_from_folders_and_no_labels(tmp_path):
    for name in ("train/NORMAL", "Validation/PNEUMONIA", "a/TEST", "retrain"):
        save(tmp_path / name / "a.png", ramp())
    dataset = Radiographs(tmp_path)
    splits = {name: record.split for name, record in zip(relative(dataset, tmp_path), dataset.records)}
    assert splits == {
        "train/NORMAL/a.png": "train",
        "Validation/PNEUMONIA/a.png": "val",
        "a/TEST/a.png": "test",
        "retrain/a.png": "",
    }
    assert all(record.label is None for record in dataset.records)
    assert [record.split for record in Radiographs(tmp_path / "train").records] == [""]
    assert len(dataset.load("test", 8)) == 1


def test_linked_folders_are_followed_once(tmp_path):
    save(tmp_path / "data/a.png", ramp())
    save(tmp_path / "elsewhere/b.png", ramp())
    (tmp_path / "data/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/loop").symlink_to(tmp_path / "data")
    assert relative(Radiographs(tmp_path / "data"), tmp_path / "data") == ["a.png", "link/b.png"]


def test_absolute_paths_survive_a_change_of_directory(tmp_path, monkeypatch):
    save(tmp_path / "data/a.png", ramp())
    monkeypatch.chdir(tmp_path)
    dataset = Radiographs("data")
    monkeypatch.chdir("/")
    assert len(dataset.load(image_size=8)) == 1


def test_absent_and_empty_folders(tmp_path):
    with pytest.raises(ValueError, match="has no image"):
        Radiographs(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        Radiographs(tmp_path / "absent")
    with pytest.raises(ValueError, match="is not a folder"):
        Radiographs(save(tmp_path / "a.png", ramp()))


def test_iter_records_is_lazy_and_has_the_order_of_the_data_set(tmp_path, monkeypatch):
    for name in ("b", "a/z/c", "a/b", "c/d", "test/a"):
        save(tmp_path / f"{name}.png", ramp())
    assert list(iter_records(tmp_path)) == list(Radiographs(tmp_path).records)
    assert relative(Radiographs(tmp_path), tmp_path) == ["b.png", "a/b.png", "a/z/c.png", "c/d.png", "test/a.png"]
    assert list(iter_records(tmp_path / "b.png")) == [Record(str(tmp_path / "b.png"))]
    (tmp_path / "list.csv").write_text("path,split\nb.png,\nb.png,\nb.png,odd\n")
    records = iter_records(tmp_path / "list.csv")
    assert [next(records), next(records)] == [Record(str(tmp_path / "b.png"))] * 2
    with pytest.raises(ValueError, match="line 4, column split"):
        next(records)

    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    records = iter_records(tmp_path)
    assert len(listed) == 1
    assert [os.path.basename(next(records).path) for _ in range(2)] == ["b.png", "b.png"]
    assert len(listed) == 2


def test_iter_records_raises_where_there_is_no_image(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "empty.csv").write_text("path\n")
    for name, message in (
        (".", "has no image"),
        ("absent", "does not exist"),
        ("notes.txt", "neither an image nor a CSV list"),
        ("empty.csv", "lists no image"),
    ):
        with pytest.raises(ValueError, match=message):
            iter_records(tmp_path / name)


def make_zhanglab(root):
    for name in (
        "train/NORMAL/IM-0115-0001.jpeg",
        "train/NORMAL/NORMAL2-IM-0115-0001-0002.jpeg",
        "train/PNEUMONIA/person1000_bacteria_2931.jpeg",
        "train/PNEUMONIA/person1000_virus_1681.jpeg",
        "test/PNEUMONIA/person1_virus_11.jpeg",
    ):
        save(root / name, ramp())
    return root


def test_zhanglab_as_published(tmp_path):
    root = make_zhanglab(tmp_path / "chest_xray")
    (root / "train/NORMAL/.DS_Store").write_text("")
    for folder in (root, tmp_path):
        dataset = ZhangLab(folder)
        assert [(r.split, r.label, r.finding, r.patient) for r in dataset.records] == [
            ("train", 0, "NORMAL", "IM-0115"),
            ("train", 0, "NORMAL", "NORMAL2-IM-0115"),
            ("train", 1, "PNEUMONIA", "person1000"),
            ("train", 1, "PNEUMONIA", "person1000"),
            ("test", 1, "PNEUMONIA", "person1"),
        ]
        assert len(dataset.load("train", 8)) == 4
        with pytest.raises(ValueError, match=r"no 'val' split; it has 4 train, 1 test"):
            dataset.load("val")
    with pytest.raises(ValueError, match="NORMAL or PNEUMONIA"):
        ZhangLab(root / "train")


@needs_zhanglab
def test_zhanglab_copy_on_this_machine_has_the_published_counts():
    dataset = open_dataset(ZHANGLAB)
    assert isinstance(dataset, ZhangLab)
    counts = {(s, c): 0 for s in ("train", "val") for c in (0, 1)}
    for record in dataset.records:
        counts[record.split, record.label] += 1
    assert counts == {("train", 0): 1241, ("train", 1): 1241, ("val", 0): 100, ("val", 1): 100}
    patients = {split: {r.patient for r in dataset.records if r.split == split} for split in ("train", "val")}
    assert "" not in patients["train"] | patients["val"]
    assert not patients["train"] & patients["val"]
    images = dataset.load("val", 32)
    assert len(images) == 200
    assert not images.failures
    assert images.labels.sum() == 100


CHEXPERT_FINDINGS = (
    "No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,Edema,Consolidation,Pneumonia,"
    "Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
)


def chexpert_row(path, view="Frontal", side="PA", **marks):
    cells = [marks.get(name.replace(" ", "_"), "") for name in CHEXPERT_FINDINGS.split(",")]
    return ",".join([path, "Female", "68", view, side, *cells])


def make_chexpert(folder, rows, name="train.csv"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join([f"Path,Sex,Age,Frontal/Lateral,AP/PA,{CHEXPERT_FINDINGS}", *rows]) + "\n")
    return folder


def test_chexpert_as_published(tmp_path):
    base = "CheXpert-v1.0-small/train/patient0000{}/study1/view1_frontal.jpg"
    folder = make_chexpert(
        tmp_path / "renamed",
        [
            chexpert_row(base.format(1), No_Finding="1.0"),
            chexpert_row(base.format(2), side="AP", No_Finding="1.0"),
            chexpert_row(base.format(3), view="Lateral", side="", No_Finding="1.0"),
            chexpert_row(base.format(4), Edema="1.0", Support_Devices="1.0"),
            chexpert_row(base.format(5), Edema="1.0", Fracture="1.0", No_Finding="1.0"),
            chexpert_row(base.format(6), Support_Devices="1.0"),
            chexpert_row(base.format(7), Pneumonia="-1.0", Edema="0.0"),
            chexpert_row(base.format(8), No_Finding="1.0", Support_Devices="1.0"),
        ],
    )
    valid = "CheXpert-v1.0-small/valid/patient64541/study1/view1_frontal.jpg"
    make_chexpert(folder, [chexpert_row(valid, Fracture="1")], "valid.csv")
    expected = r"train.csv: 1 frontal PA radiographs have a mark of -1 \(uncertain\), .* 1 of them .* are left out"
    with pytest.warns(UserWarning, match=expected):
        dataset = CheXpert(folder)
    assert [(r.patient, r.split, r.label, r.finding) for r in dataset.records] == [
        ("patient00001", "train", 0, "No Finding"),
        ("patient00004", "train", 1, "Edema"),
        ("patient00005", "train", 1, "Edema; Fracture"),
        ("patient00008", "train", 0, "No Finding"),
        ("patient64541", "val", 1, "Fracture"),
    ]
    assert dataset.records[0].path == str(folder / "train/patient00001/study1/view1_frontal.jpg")
    save(folder / "valid/patient64541/study1/view1_frontal.jpg", ramp())
    with pytest.warns(UserWarning, match="uncertain") as caught:
        assert isinstance(open_dataset(folder), CheXpert)
    assert len(caught) == 1 and len(dataset.load("val", 8)) == 1


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ({"Edema": "-1.0"}, None),
        ({"No_Finding": "1.0", "Edema": "-1.0"}, (0, "No Finding")),
        ({"Edema": "-1.0", "Fracture": "1.0"}, (1, "Fracture")),
        ({"No_Finding": "-1.0", "Edema": "0.0"}, None),
    ],
    ids=["alone", "beside No Finding", "beside a finding", "no finding itself"],
)
def test_uncertain_chexpert_labels_count_as_not_marked(tmp_path, marks, expected):
    path = "CheXpert-v1.0/train/patient0000{}/study1/view1_frontal.jpg"
    rows = [chexpert_row(path.format(1), Fracture="1.0"), chexpert_row(path.format(2), **marks)]
    with pytest.warns(UserWarning, match=f"1 frontal PA .*; {int(expected is None)} of them"):
        found = [(r.label, r.finding) for r in CheXpert(make_chexpert(tmp_path / "c", rows)).records]
    assert found == [(1, "Fracture"), *([expected] if expected else [])]


def test_every_chexpert_finding_counts_but_support_devices(tmp_path):
    path = "CheXpert-v1.0/train/patient{:05d}/study1/view1_frontal.jpg"
    names = CHEXPERT_FINDINGS.split(",")[1:]
    rows = [chexpert_row(path.format(i), **{name.replace(" ", "_"): "1.0"}) for i, name in enumerate(names)]
    dataset = CheXpert(make_chexpert(tmp_path / "c", rows))
    assert [record.finding for record in dataset.records] == names[:-1]
    assert len(names[:-1]) == 12
    assert all(record.label == 1 for record in dataset.records)


def test_chexpert_errors(tmp_path):
    folder = make_chexpert(tmp_path / "c", [chexpert_row("somewhere/a.jpg", Edema="1")])
    with pytest.raises(ValueError, match=r"train.csv, line 2, column Path: .*somewhere/a.jpg"):
        CheXpert(folder)
    (folder / "train.csv").write_text("Path,Frontal/Lateral,AP/PA,No Finding\n")
    with pytest.raises(ValueError, match="columns are missing: Atelectasis"):
        CheXpert(folder)
    with pytest.raises(ValueError, match="no CheXpert"):
        CheXpert(tmp_path)


def make_covidx(folder, train, test=""):
    for name, text in (("train", train), ("test", test)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        if text:
            (folder / f"{name}.txt").write_text(text)
    return folder


def test_covidx_as_published(tmp_path):
    folder = make_covidx(
        tmp_path / "x",
        "p1 a.png normal rsna\np2 COVID 12.jpg COVID-19 cohen\n\n",
        "p3 b.png pneumonia rsna\n",
    )
    dataset = COVIDx(folder)
    assert dataset.records == (
        Record(str(folder / "train/a.png"), "train", 0, "normal", "p1"),
        Record(str(folder / "train/COVID 12.jpg"), "train", 1, "COVID-19", "p2"),
        Record(str(folder / "test/b.png"), "test", 1, "pneumonia", "p3"),
    )
    save(folder / "train/a.png", ramp())
    assert isinstance(open_dataset(folder), COVIDx)
    images = open_dataset(folder).load("train", 8)
    assert (len(images), len(images.failures)) == (1, 1)
    assert "No such file" in images.failures[0].reason


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("p1 a.png normal rsna\np2 b.png negative rsna\n", "train.txt, line 2: label must be one of .*'negative'"),
        ("p1 a.png normal\n", "train.txt, line 1: expected 'patient filename label source'"),
    ],
)
def test_covidx_errors_name_the_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        COVIDx(make_covidx(tmp_path, text))


def test_open_dataset_tells_layouts_apart(tmp_path):
    make_zhanglab(tmp_path / "z/chest_xray")
    assert type(open_dataset(tmp_path / "z")) is ZhangLab
    save(tmp_path / "any/sub/a.png", ramp())
    assert type(open_dataset(str(tmp_path / "any"))) is Radiographs
    (tmp_path / "any/train.csv").write_text("path\nsub/a.png\n")
    (tmp_path / "any/train.txt").write_text("notes\n")
    assert type(open_dataset(tmp_path / "any")) is Radiographs
    listed = open_dataset(tmp_path / "any/train.csv")
    assert listed.records == (Record(str(tmp_path / "any/sub/a.png")),)
    assert np.array_equal(listed.load(image_size=(12, 20)).pixels[0, 0].numpy(), ramp())
    single = open_dataset(tmp_path / "any/sub/a.png")
    assert len(single) == 1
    with pytest.raises(ValueError, match="neither an image nor a CSV"):
        open_dataset(tmp_path / "any/train.txt")
    with pytest.raises(ValueError, match="does not exist"):
        open_dataset(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no image"):
        open_dataset(tmp_path / "empty")


def test_loading_passes_options_on(tmp_path):
    save(tmp_path / "a.png", ramp(10, 30, 200))
    pixels = Radiographs(tmp_path).load(None, 30, aspect="pad", intensity="range", workers=1).pixels
    assert pixels[0, 0, 0, 0] == 0
    assert pixels.max() == 200


def test_load_uses_the_preprocessing_of_the_data_set_by_default(tmp_path):
    save(tmp_path / "a.png", ramp(10, 30))
    dataset = Radiographs(tmp_path, preprocessing=Preprocessing((20, 24), "crop"))
    expected = load_images([tmp_path / "a.png"], (20, 24), aspect="crop").pixels
    assert np.array_equal(dataset.load().pixels, expected)
    assert np.array_equal(
        dataset.load(aspect="pad").pixels, load_images([tmp_path / "a.png"], (20, 24), aspect="pad").pixels
    )
    assert dataset.load(image_size=8).image_size == (8, 8)
    image, label = dataset[0]
    assert np.array_equal(image, dataset.load().batch([0])[0]) and label == -1


def test_patterns_leave_out_masks_in_every_kind_of_data_set(tmp_path):
    make_zhanglab(tmp_path / "z/chest_xray")
    save(tmp_path / "any/a.png", ramp())
    save(tmp_path / "any/masks/a.png", ramp())
    (tmp_path / "any.csv").write_text("path\nany/a.png\nany/masks/a.png\n")
    for path in ("any", "any.csv"):
        assert [r.path for r in open_dataset(tmp_path / path, exclude="masks").records] == [str(tmp_path / "any/a.png")]
        assert [r.path for r in iter_records(tmp_path / path, exclude=["masks", "x"])] == [str(tmp_path / "any/a.png")]
    assert len(Radiographs(tmp_path / "any", exclude="masks")) == 1
    assert len(open_dataset(tmp_path / "z", exclude=["*_virus_*"])) == 3
    for path in ("z", "any", "any.csv"):
        with pytest.raises(InputError, match="has no image"):
            open_dataset(tmp_path / path, exclude="*.*")


def test_a_folder_that_cannot_be_listed_fails_alone(tmp_path, monkeypatch):
    save(tmp_path / "a.png", ramp())
    save(tmp_path / "locked/b.png", ramp())
    scandir = os.scandir

    def refuse(path="."):
        if os.path.basename(path) == "locked":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert relative(Radiographs(tmp_path), tmp_path) == ["a.png", "locked"]
    images = Radiographs(tmp_path).load()
    assert images.failures == (Failure(str(tmp_path / "locked"), "the folder cannot be listed: Permission denied"),)
    report = scan(tmp_path)
    assert (report.readable, report.failures) == (1, images.failures)


def test_missing_files_of_a_split_are_named(tmp_path):
    folder = make_covidx(tmp_path / "x", "p1 a.png normal rsna\n", "p2 b.png pneumonia rsna\n")
    save(folder / "train/a.png", ramp())
    dataset = open_dataset(folder)
    assert dataset.missing() == dataset.missing("test") == [str(folder / "test/b.png")]
    assert dataset.missing("train") == []
