"""Dividing images between training and validation."""

import os
import random

import pytest

from simsid.data import Dataset, Record, partition, split_by_patient
from simsid.data.splits import FEWEST_HELD_OUT
from simsid.errors import InputError


def dataset(spec):
    """A data set from words split:label:patient."""
    made = []
    for i, word in enumerate(spec.split()):
        split, label, patient = word.split(":")
        made.append(Record(f"/images/{i}.png", split, int(label) if label else None, "", patient))
    return Dataset(made, "images")


def test_partition_keeps_the_splits_of_a_data_set_with_enough_normal_validation_images():
    train, val = partition(
        dataset(" ".join(["train:0:a"] * 3 + ["train:1:b"] + ["val:0:c"] * FEWEST_HELD_OUT + ["val:1:d", "test:0:e"])),
        0.3,
    )
    assert [record.patient for record in train] == ["a"] * 3
    assert [record.patient for record in val] == ["c"] * FEWEST_HELD_OUT + ["d"]
    assert {record.split for record in train} == {"train"} and {record.split for record in val} == {"val"}


def test_partition_holds_out_whole_patients_where_normal_validation_images_are_few():
    normal = [f":0:p{i // 2}" for i in range(40)]
    train, val = partition(
        dataset(" ".join([*normal, ":1:p3", ":1:p7", ":1:q", ":1:", "val:0:v", "val:1:w", "test:1:t"])), 0.25
    )
    patients = {record.patient for record in train}
    assert not patients & {record.patient for record in val} and "t" not in patients
    assert all(record.label == 0 for record in train) and len(train) == 30
    abnormal = {record.patient for record in val if record.label == 1}
    assert {"q", "", "w"} <= abnormal <= {"q", "", "w", "p3", "p7"} - patients
    assert {record.patient for record in val if record.label == 0} >= {"v"}


def test_partition_of_one_patient_holds_nothing_out_and_needs_a_normal_image():
    train, val = partition(dataset("train:0:a train:0:a"))
    assert len(train) == 2 and val == []
    with pytest.raises(InputError, match="images has no normal image to train on"):
        partition(dataset("train:1:a test:0:b"))
    with pytest.raises(InputError, match="val_share must lie strictly between 0 and 1, got 1"):
        partition(dataset("train:0:a"), 1)


def test_split_draws_file_names_that_are_not_utf8():
    names = [os.fsdecode(b"/data/%d\xfc.png" % i) for i in range(20)]
    assert [record.split for record in split_by_patient([Record(name) for name in names], 0.25)].count("val") == 5


def make_records(folder="/data", patients=60):
    generator = random.Random(3)
    return [
        Record(f"{folder}/{patient % 3}/p{patient:03d}_{image}.png", "", int(patient % 4 == 0), "", f"p{patient:03d}")
        for patient in range(patients)
        for image in range(generator.randint(1, 4))
    ]


def test_split_keeps_patients_apart_and_meets_the_fraction_in_each_class():
    records = split_by_patient(make_records(), 0.25)
    assert {record.split for record in records} == {"train", "val"}
    sides = {}
    for record in records:
        sides.setdefault(record.patient, set()).add(record.split)
    assert all(len(side) == 1 for side in sides.values())
    for label in (0, 1):
        splits = [record.split for record in records if record.label == label]
        assert splits.count("val") / len(splits) == pytest.approx(0.25, abs=0.06)


def test_split_ignores_the_listing_order_and_keeps_it():
    records = make_records()
    shuffled = random.Random(0).sample(records, len(records))
    expected = {record.path: record.split for record in split_by_patient(records, 0.2)}
    divided = split_by_patient(shuffled, 0.2)
    assert [record.path for record in divided] == [record.path for record in shuffled]
    assert {record.path: record.split for record in divided} == expected


def test_split_depends_on_the_seed_alone():
    records = make_records()
    assert split_by_patient(records, 0.2, seed=1) == split_by_patient(records, 0.2, seed=1)
    assert split_by_patient(records, 0.2, seed=1) != split_by_patient(records, 0.2, seed=2)


def test_split_without_patients_does_not_depend_on_the_location_of_the_folder():
    def divide(folder):
        names = [os.path.join(folder, str(i % 5), f"{i}.png") for i in range(50)]
        return [record.split for record in split_by_patient([Record(name) for name in names], 0.2)]

    assert divide("/a") == divide("/somewhere/else")
    assert divide("/a").count("val") == 10


def test_split_keeps_named_splits_and_gives_their_patients_the_same():
    records = [Record("a", "test", 0, "", "p1"), Record("b", "", 0, "", "p1"), Record("c", "train"), Record("d")]
    divided = split_by_patient(records, 0.5)
    assert [record.split for record in divided[:3]] == ["test", "test", "train"]
    assert divided[3].split == "train"


@pytest.mark.parametrize("count", [2, 3, 30])
def test_split_leaves_at_least_one_on_each_side(count):
    for fraction in (0.001, 0.999):
        splits = {record.split for record in split_by_patient([Record(f"{i}.png") for i in range(count)], fraction)}
        assert splits == {"train", "val"}


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5])
def test_split_refuses_a_fraction_outside_0_to_1(fraction):
    with pytest.raises(ValueError, match="val_share"):
        split_by_patient([Record("a")], fraction)
