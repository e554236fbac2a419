"""The writer of every CSV file: quoting, formulas, and an atomic replacement."""

import csv

import pytest

from simsid import checkpoint

FORMULAS = ["=A1", "+1", "-1.5", "@x", "\tx", "\rx", "\nx", "'=A1", "''@"]
CELLS = ["", "a", "a,b", 'a"b', "a\rb", "a\nb", " a ", "'a", "ü", "\udcfc", *FORMULAS]


def test_cells_survive_a_csv_reader_and_unescape_and_none_begins_a_formula(tmp_path):
    with checkpoint.csv_writer(tmp_path / "table.csv", ["text", "number"]) as write:
        for cell in CELLS:
            write([cell, -0.5])
    with open(tmp_path / "table.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.reader(file, strict=True))
    assert rows[0] == ["text", "number"] and len(rows) == len(CELLS) + 1
    assert [checkpoint.unescape_cell(text) for text, _ in rows[1:]] == CELLS
    assert not [text for text, _ in rows[1:] if text[:1] in ("=", "+", "-", "@", "\t", "\r", "\n")]
    assert {number for _, number in rows[1:]} == {"-0.5"}
    assert (tmp_path / "table.csv").read_bytes().startswith(b'text,number\n,-0.5\na,-0.5\n"a,b",-0.5\n')


def test_csv_writer_leaves_the_old_file_when_the_block_raises(tmp_path):
    (tmp_path / "table.csv").write_text("old")
    with pytest.raises(KeyError), checkpoint.csv_writer(tmp_path / "table.csv", ["a"]) as write:
        write([None])
        raise KeyError
    assert (tmp_path / "table.csv").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with checkpoint.csv_writer(tmp_path / "table.csv", ["a", "b"]) as write:
        write([None, 3])
    assert (tmp_path / "table.csv").read_bytes() == b"a,b\n,3\n"
