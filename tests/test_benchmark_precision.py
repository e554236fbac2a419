"""benchmarks/precision.py: int8 as it is simulated, the table of both precisions, and its verdict."""

import pathlib
import sys

import pytest
import tiny
import torch

from simsid.models import PixelPCA

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))

import precision


def test_rounded_values_are_levels_of_each_part():
    values = torch.randn(3, 4, 5, 5) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None, None]
    scale = values.abs().amax((1, 2, 3), keepdim=True) / 127
    levels = precision.rounded(values) / scale
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    assert levels.abs().max() <= 127.001 and len(levels[0].round().unique()) > 50
    assert ((precision.rounded(values) - values).abs() <= 0.501 * scale).all()
    assert not precision.rounded(torch.zeros(1, 1, 2, 2)).any()


def test_int8_changes_a_copy_of_encoder_and_student_alone():
    frozen = tiny.model().eval().freeze("float32")
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    narrow, images = precision.simulate_int8(frozen), tiny.images(2)
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())
    changed = {name for name, value in narrow.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith(("encoder.", "student.")) and name.endswith("weight") for name in changed)
    exact, rough = frozen.reconstruct(images), narrow.reconstruct(images)
    error = (rough - exact).abs().mean() / exact.abs().mean()
    assert 1e-6 < error < 0.1
    torch.testing.assert_close(narrow.reconstruct(images[1:]), rough[1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["bfloat16", "int8"])
def test_a_row_of_every_signal_and_the_verdict(name, tmp_path, capsys):
    tiny.calibrated(tmp_path / "model")
    films = tiny.zhanglab(tmp_path / "films", train=8)
    status = precision.main([str(tmp_path / "model"), str(films), "--precision", name, "--split", "test"])
    head, _, *rows = tiny.cells(capsys.readouterr().out)
    assert head[2] == name and {"residual", "memory_distance", "discriminator_per_image"} <= {row[0] for row in rows}
    limits = [abs(float(row[2]) - float(row[1])) <= 0.002 and float(row[4]) > 0.999 for row in rows]
    assert status == int(not all(limits))


def test_int8_of_another_kind_of_model_is_refused():
    model = PixelPCA(image_size=16, components=3).fit(tiny.noise(12, 16), tiny.noise(19, 16, seed=1))
    with pytest.raises(SystemExit, match="for networks alone"):
        precision.simulate_int8(model.freeze("float32"))
