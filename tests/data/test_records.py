"""CSV lists, and dividing patients between training and validation."""

import os
import random

import pytest

from simsid.data import Record, read_csv, split_by_patient, write_csv
from simsid.data.records import iter_csv


def write(path, text, encoding="utf-8"):
    path.write_text(text, encoding)
    return path


def test_reads_every_column_with_synonyms_and_relative_paths(tmp_path):
    file = write(
        tmp_path / "list.csv",
        "path,label,split,patient,finding,score\n"
        "a.png,0,train,p1,NORMAL,0.5\n"
        "sub/b.dcm,Abnormal,valid,p2,mass,\n"
        "/far/c.png,,,,,\n"
        "\n"
        "d.png,1.0,Testing,,,\n",
        "utf-8-sig",
    )
    assert read_csv(file) == [
        Record(str(tmp_path / "a.png"), "train", 0, "NORMAL", "p1"),
        Record(str(tmp_path / "sub" / "b.dcm"), "val", 1, "mass", "p2"),
        Record("/far/c.png"),
        Record(str(tmp_path / "d.png"), "test", 1),
    ]


def test_path_alone_is_enough(tmp_path):
    assert read_csv(write(tmp_path / "list.csv", "path\na.png\n")) == [Record(str(tmp_path / "a.png"))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\na.png,0\nb.png,maybe\n", "line 3, column label: .*'maybe'"),
        ("path,label\na.png,2\n", "line 2, column label"),
        ("path,split\na.png,holdout\n", "line 2, column split: .*'holdout'"),
        ("path,label\n,0\n", "line 2, column path: empty"),
        ("path,label\na.png\n", "line 2: 1 cells where the header has 2 columns"),
        ("path,label\na.png,0,1\n", "line 2: 3 cells"),
        ("file,label\na.png,0\n", "line 1: no column 'path'"),
        ("path;label\na.png;0\n", "line 1: no column 'path'.*comma"),
        ("path,lable\na.png,1\n", "line 1: unknown column 'lable', did you mean 'label'"),
        ("path,label,label\na.png,1,0\n", "line 1: column 'label' appears 2 times"),
        ("path\na.png\n./a.png\n", "line 3, column path: .* already on line 2"),
        ('path\n"a.png\n', "line 2: unexpected end"),
        ("path\n", "lists no image"),
        ("", "no column 'path'"),
    ],
)
def test_errors_name_line_and_column(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_csv(write(tmp_path / "list.csv", text))
    assert "list.csv" in str(caught.value)


def test_bytes_that_are_no_text_may_stand_in_paths_alone(tmp_path):
    (tmp_path / "list.csv").write_bytes(b"path,label\n\xfcbung.png,1\n")
    (record,) = read_csv(tmp_path / "list.csv")
    assert os.fsencode(record.path) == os.fsencode(tmp_path) + b"/\xfcbung.png" and record.label == 1
    write_csv(tmp_path / "copy.csv", [record])
    assert read_csv(tmp_path / "copy.csv") == [record]
    for column in ("label", "split", "patient", "finding"):
        (tmp_path / "list.csv").write_bytes(f"path,{column}\na.png,".encode() + b"\xfc\n")
        with pytest.raises(ValueError, match=f"line 2, column {column}: not UTF-8 text"):
            read_csv(tmp_path / "list.csv")
    with pytest.raises(ValueError, match="line 1: not UTF-8 text"):
        read_csv(write(tmp_path / "list.csv", "path\nübung.png\n", "utf-16"))


def test_a_list_is_read_row_by_row(tmp_path):
    file = write(tmp_path / "list.csv", "path,label\na.png,0\na.png,0\nb.png,maybe\n")
    rows = iter_csv(file)
    assert [next(rows), next(rows)] == [Record(str(tmp_path / "a.png"), "", 0)] * 2
    with pytest.raises(ValueError, match="line 4, column label"):
        next(rows)
    with pytest.raises(ValueError, match="lists no image"):
        list(iter_csv(write(tmp_path / "list.csv", "path\n\n")))


def test_what_is_written_reads_back(tmp_path):
    records = [
        Record("/a, with comma.png", "train", 0, "NORMAL", "p1"),
        Record('/b "quoted".png', "", None),
        Record("/ü.png", "test", 1, "several", "p2"),
    ]
    write_csv(tmp_path / "out.csv", records, {"score": [0.25, None, 1.0]})
    assert read_csv(tmp_path / "out.csv") == records
    lines = (tmp_path / "out.csv").read_text("utf-8").splitlines()
    assert lines[0] == "path,label,split,patient,finding,score"
    assert [line.rsplit(",", 1)[1] for line in lines[1:]] == ["0.25", "", "1.0"]


def test_extra_columns_are_checked(tmp_path):
    with pytest.raises(ValueError, match="'score' has 1 values for 2 records"):
        write_csv(tmp_path / "out.csv", [Record("a"), Record("b")], {"score": [1]})
    with pytest.raises(ValueError, match="'label' is already"):
        write_csv(tmp_path / "out.csv", [Record("a")], {"label": [1]})
    assert not (tmp_path / "out.csv").exists()


def make_records(folder="/data", patients=60):
    generator = random.Random(3)
    return [
        Record(f"{folder}/{patient % 3}/p{patient:03d}_{image}.png", "", int(patient % 4 == 0), "", f"p{patient:03d}")
        for patient in range(patients)
        for image in range(generator.randint(1, 4))
    ]


def test_split_keeps_patients_apart_and_meets_the_share_in_each_class():
    records = split_by_patient(make_records(), 0.25)
    assert {record.split for record in records} == {"train", "val"}
    sides = {}
    for record in records:
        sides.setdefault(record.patient, set()).add(record.split)
    assert all(len(side) == 1 for side in sides.values())
    for label in (0, 1):
        mine = [record.split for record in records if record.label == label]
        assert mine.count("val") / len(mine) == pytest.approx(0.25, abs=0.06)


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


def test_split_without_patients_does_not_depend_on_where_the_folder_lies():
    def divide(folder):
        names = [os.path.join(folder, str(i % 5), f"{i}.png") for i in range(50)]
        return [record.split for record in split_by_patient([Record(name) for name in names], 0.2)]

    assert divide("/a") == divide("/somewhere/else")
    assert divide("/a").count("val") == 10


def test_split_keeps_what_is_said_and_adds_to_it():
    records = [Record("a", "test", 0, "", "p1"), Record("b", "", 0, "", "p1"), Record("c", "train"), Record("d")]
    divided = split_by_patient(records, 0.5)
    assert [record.split for record in divided[:3]] == ["test", "test", "train"]
    assert divided[3].split == "train"


@pytest.mark.parametrize("count", [2, 3, 30])
def test_split_leaves_at_least_one_on_each_side(count):
    for share in (0.001, 0.999):
        splits = {record.split for record in split_by_patient([Record(f"{i}.png") for i in range(count)], share)}
        assert splits == {"train", "val"}


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5])
def test_split_refuses_an_impossible_share(share):
    with pytest.raises(ValueError, match="val_share"):
        split_by_patient([Record("a")], share)
