"""CSV lists of images."""

import os
import warnings

import pytest

from simsid.data import Failure, Record, missing_files, read_csv, write_csv
from simsid.data.records import failure_summary, iter_csv


def write(path, text, encoding="utf-8"):
    path.write_text(text, encoding)
    return path


def test_reads_every_column_with_synonyms_and_relative_paths(tmp_path):
    file = write(
        tmp_path / "list.csv",
        "path,label,split,patient,finding\n"
        "a.png,0,train,p1,NORMAL\n"
        "sub/b.dcm, Abnormal,valid,p2,mass\n"
        "/far/c.png,,,,\n"
        "\n"
        "d.png,1.0,Testing,,\n",
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
        ("path,labels\na.png,1\n", "line 1: unknown column 'labels', did you mean 'label'"),
        ("path,Patient ID\na.png,1\n", "line 1: unknown column 'patient id', did you mean 'patient'"),
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


def test_bytes_that_are_not_utf8_are_kept_in_paths_and_refused_elsewhere(tmp_path):
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


def test_iter_csv_reads_row_by_row(tmp_path):
    file = write(tmp_path / "list.csv", "path,label\na.png,0\na.png,0\nb.png,maybe\n")
    rows = iter_csv(file)
    assert [next(rows), next(rows)] == [Record(str(tmp_path / "a.png"), "", 0)] * 2
    with pytest.raises(ValueError, match="line 4, column label"):
        next(rows)
    with pytest.raises(ValueError, match="lists no image"):
        list(iter_csv(write(tmp_path / "list.csv", "path\n\n")))


def test_written_records_read_back(tmp_path):
    records = [
        Record("/a, with comma.png", "train", 0, "NORMAL", "p1"),
        Record('/b "quoted".png', "", None),
        Record("/ü.png", "test", 1, "several", "p2"),
    ]
    write_csv(tmp_path / "out.csv", records, {"score": [0.25, None, 1.0]})
    with pytest.warns(UserWarning, match="ignored column 'score'"):
        assert read_csv(tmp_path / "out.csv") == records
    lines = (tmp_path / "out.csv").read_text("utf-8").splitlines()
    assert lines[0] == "path,label,split,patient,finding,score"
    assert [line.rsplit(",", 1)[1] for line in lines[1:]] == ["0.25", "", "1.0"]


LINE_BREAKS = ["a\rb", "a\nb", "a\r\nb", "\ra"]
SPACES = [" a", "a ", "a\t", "\ta"]
FORMULAS = ["-a", "=1+1", "+a", "@a", "'=a", "''-a"]
NAMES = [*LINE_BREAKS, *SPACES, *FORMULAS, "'a", '"a"', "a,b", "a'b"]


def test_any_file_name_and_text_survives_a_list(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        (tmp_path / name).touch()
    records = [Record(str(tmp_path / name), "", 0, name.strip(), name.strip()) for name in NAMES]
    write_csv("list.csv", records)
    assert read_csv("list.csv") == records
    write_csv("list.csv", [Record(name) for name in NAMES])
    assert [record.path for record in read_csv("list.csv")] == [str(tmp_path / name) for name in NAMES]


def test_spaces_around_paths_are_dropped_unless_the_file_has_them(tmp_path):
    (tmp_path / "b.png ").touch()
    rows = read_csv(write(tmp_path / "list.csv", "label, path\n0, a.png \n0,b.png \n"))
    assert [record.path for record in rows] == [str(tmp_path / "a.png"), str(tmp_path / "b.png ")]


def test_ignored_columns_are_named_in_a_warning(tmp_path):
    file = write(tmp_path / "list.csv", "path,target,Patient Age,finding labels\na.png,1,50,mass\n")
    with pytest.warns(UserWarning, match="ignored columns 'target', 'patient age', 'finding labels'; .* path, label"):
        assert read_csv(file) == [Record(str(tmp_path / "a.png"))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_csv(write(tmp_path / "list.csv", "path,label,split,patient,finding\na.png,1,,,\n"))


def test_umlauts_in_a_list_name_the_same_file_in_an_ascii_locale(tmp_path, monkeypatch):
    file = write(tmp_path / "list.csv", "path,finding\nRöntgen.png,Ödem\n")
    # What Python does with LC_ALL=C: names of files are ASCII, other bytes lone surrogates.
    monkeypatch.setattr(os, "fsdecode", lambda name: name.decode("ascii", "surrogateescape"))
    (record,) = read_csv(file)
    assert record == Record(os.path.join(tmp_path, "R\udcc3\udcb6ntgen.png"), finding="Ödem")
    write_csv(tmp_path / "copy.csv", [record])
    assert (tmp_path / "copy.csv").read_text("utf-8").splitlines()[1] == f"{tmp_path}/Röntgen.png,,,,Ödem"


def test_missing_files_and_failures_are_named(tmp_path):
    (tmp_path / "a.png").touch()
    records = [Record(str(tmp_path / "a.png")), Record(str(tmp_path / "b.png"))]
    assert missing_files(records) == [str(tmp_path / "b.png")]
    failures = [Failure("b\r.png", "it is empty"), Failure("c.png", "no")]
    assert failure_summary(failures, 9) == r"2 of 9 files could not be read; the first, b\r.png: it is empty"
    assert failure_summary(failures, 2).startswith("none of the 2 files could be read; the first, ")


def test_extra_columns_are_checked(tmp_path):
    with pytest.raises(ValueError, match="'score' has 1 values for 2 records"):
        write_csv(tmp_path / "out.csv", [Record("a"), Record("b")], {"score": [1]})
    with pytest.raises(ValueError, match="'label' is already"):
        write_csv(tmp_path / "out.csv", [Record("a")], {"label": [1]})
    assert not (tmp_path / "out.csv").exists()
