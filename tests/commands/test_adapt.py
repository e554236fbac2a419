"""`simsid adapt`: a site's images are added to a copy of the model, and taken out again."""

import pytest
import tiny

import simsid as library
from simsid import FeatureMemory


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory") / "fitted"
    FeatureMemory(image_size=64, components=8, items=4, grid=2).fit(tiny.noise(9, 64)).save(folder)
    return folder


def test_adapted_model_is_undone_to_what_was_fitted(simsid, memory, tmp_path):
    tiny.films(tmp_path / "site", 9)
    damaged = tiny.damaged(tmp_path / "site")
    before = library.load(memory).identity()
    done = simsid("adapt", memory, "site", "-o", "new model")
    assert done.code == 0, done.err
    assert "9 images added to a memory of 9" in done.out
    assert f"1 of 10 files could not be read, such as {damaged}: " in done.out and "Failure(" not in done.out
    assert "9 normal images say little" in done.err and "encoding" not in done.err, "a bar belongs on a terminal"
    assert done.out.endswith("is as it was; undo with: simsid adapt 'new model' --undo -o FOLDER\n")
    assert library.load(memory).identity() == before != library.load(tmp_path / "new model").identity()
    done = simsid("adapt", "new model", "--undo", "-o", "again")
    assert done.code == 0 and done.out.startswith("again: new model without the images that it was adapted to")
    assert library.load(tmp_path / "again").identity() == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("MEMORY --undo -o again", "the model is not adapted: there is nothing to undo"),
        ("NETWORK --undo -o again", "a model of kind 'simsid' is never adapted: there is nothing to undo"),
        ("MEMORY site --undo -o again", "--undo takes no images; leave out site"),
        ("MEMORY -o again", "adapt needs normal images: simsid adapt MODEL DATA -o FOLDER"),
        ("MEMORY --undo -o MEMORY", "already holds a model; choose another folder with -o"),
        ("zhanglab --undo -o again", "the model is not adapted"),
    ],
)
def test_what_cannot_be_undone_gets_one_sentence(simsid, model, memory, tmp_path, line, message):
    done = simsid("adapt", *line.replace("MEMORY", str(memory)).replace("NETWORK", str(model)).split())
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1, done.err
    assert not (tmp_path / "again").exists()
