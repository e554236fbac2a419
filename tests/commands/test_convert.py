"""`simsid convert`: checkpoints of the released code become a model folder."""

import re

import tiny
import torch

from simsid import Model, checkpoint


def released_style(model):
    """A model's tensors as the released code names them: `(model.pth, discriminator.pth)`."""
    block = {"entry.0": "conv1.0", "entry.1": "conv1.1", "inner.0": "conv2.0", "inner.1": "conv2.1"}
    block |= {"outer.0": "conv2.3", "outer.1": "conv2.4"}
    start = {"encoder.entry": "in_conv.conv", "student.output": "out_conv.conv", "teacher.output": "teacher_out.conv"}
    start |= {"student.inpainting.entry": "inpaint_block.bottleneck_conv1"}
    start |= {"student.inpainting.exit": "inpaint_block.bottleneck_conv2", "student.inpainting.ff": "inpaint_block.ff"}
    start |= {"student.inpainting.feed_forward": "inpaint_block.ff"}
    start |= {"student.inpainting.mixing.output": "inpaint_block.attention.out_proj"}
    start |= {f"student.inpainting.norm{i}": f"inpaint_block.attn_norm{i}" for i in (1, 2)}
    for i in range(model.config.levels):
        start |= {f"encoder.down.{i}": f"down_blocks.{i}.mpconv", f"student.up.{i}": f"up_blocks.{i}.conv"}
        start |= {f"teacher.up.{i}": f"teacher_ups.{i}.conv"}
    generator, discriminator, state = {}, {}, checkpoint.tensors(model)
    for name, tensor in state.items():
        if name.startswith("discriminator."):
            kind, number, what = re.fullmatch(
                r"discriminator\.(convolutions|norms|output)\.?(\d*)\.(\w+)", name
            ).groups()
            if kind == "output":
                discriminator[f"regressor.{what}"] = tensor
            else:
                index = 3 * int(number) + (3 if kind == "norms" else 0 if number == "0" else -1)
                discriminator[f"conv_model.{index}.{what}"] = tensor
        elif name.endswith("memory.items"):
            memory = "inpaint_block" if "inpainting" in name else f"memory_blocks.{name.split('.')[2]}"
            for location, items in enumerate(tensor):
                generator[f"{memory}.memory.{location}.memMatrix"] = items
        elif ".mixing.query." in name:
            other = state[name.replace("query", "key_value")]
            generator[f"inpaint_block.attention.in_proj_{name.split('.')[-1]}"] = torch.cat([tensor, other])
        elif ".mixing.key_value." not in name:
            longest = max((prefix for prefix in start if name.startswith(prefix + ".")), key=len)
            rest = name.removeprefix(longest + ".")
            for here, released in block.items():
                if rest.startswith(here + ".") and rest.count(".") == 2:
                    rest = rest.replace(here, released, 1)
            generator[f"{start[longest]}.{rest}"] = tensor
    return generator, discriminator


def test_converted_models_have_the_same_tensors_and_can_be_calibrated(simsid, films, tmp_path):
    model = tiny.model(decoder_memory="subpatch", threshold="exclusive", heads=8).eval()
    for name, part in zip(("model.pth", "discriminator.pth"), released_style(model)):
        torch.save(part, tmp_path / name)
    options = ["model.pth", "discriminator.pth", "--memory", "matrix", "--decoder-memory", "subpatch", "--topk", "2"]
    done = simsid("convert", *options, "-o", tmp_path / "plain")
    assert done.code == 0, done.err
    assert "48 pixels, 2 x 2 patches, width 4, 2 levels, 6 and 6 items" in done.out
    assert "simsid calibrate" in done.out and Model.load(tmp_path / "plain").calibration is None
    done = simsid("convert", *options, "-o", tmp_path / "out", "--calibrate", films)
    assert done.code == 0 and "calibrated on 6 normal images, with 1 held out" in done.out
    kept = Model.load(tmp_path / "out")
    assert kept.config == model.config.replace(signal="discriminator_per_image")
    converted = checkpoint.tensors(kept)
    assert all(torch.equal(value, converted[name]) for name, value in checkpoint.tensors(model).items())
    assert simsid("score", tmp_path / "out", films, "-o", tmp_path / "scores").code == 0

    refused = simsid("convert", *options, "-o", tmp_path / "out")
    assert refused.code == 2 and "already holds a model" in refused.err
    refused = simsid("convert", "discriminator.pth", *options[1:], "-o", tmp_path / "new")
    assert refused.code == 2 and refused.err.startswith("simsid: ") and not (tmp_path / "new").exists()
    (tmp_path / "code.pth").write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")
    refused = simsid("convert", "code.pth", *options[1:], "-o", tmp_path / "new")
    assert refused.code == 2 and refused.err.startswith("simsid: code.pth") and not (tmp_path / "executed").exists()
