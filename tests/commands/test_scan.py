"""`simsid scan`: what a folder holds, as text and as JSON."""

import json

import tiny


def test_scan_counts_images_and_names_rejected_files(simsid, tmp_path):
    tiny.films(tmp_path / "mixed", 2)
    done = simsid("scan", "mixed")
    assert done.code == 0 and "2 readable images, 0 rejected" in done.out
    path = tiny.damaged(tmp_path / "mixed")
    done = simsid("scan", "mixed")
    assert done.code == 1 and "2 readable images, 1 rejected" in done.out and "damaged.png: " in done.out
    done = simsid("scan", "mixed", "--json")
    document = json.loads(done.out)
    assert done.code == 1 and document["formats"] == {"PNG": 2}
    assert [failure["path"] for failure in document["failures"]] == [path]


def test_excluded_files_are_not_scanned(simsid, tmp_path):
    tiny.films(tmp_path / "mixed", 2)
    tiny.damaged(tmp_path / "mixed")
    done = simsid("scan", "mixed", "--exclude", "damaged*")
    assert done.code == 0 and "2 readable images, 0 rejected" in done.out
