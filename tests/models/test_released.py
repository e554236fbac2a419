"""The converter of released checkpoints: a round trip on random tensors, and one sentence for each thing amiss."""

import pathlib
import pickle
import re

import pytest
import tiny
import torch

from simsid import checkpoint
from simsid.errors import ConversionError
from simsid.models import released
from simsid.models.model import Model
from simsid.models.released import convert, read_released

BLOCK = {ours: theirs for theirs, ours in released.BLOCK.items()}


def export(model: Model) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Name a model's tensors as the released code does; written apart from the converter's own rules."""
    parts: dict[str, dict[str, torch.Tensor]] = {"generator": {}, "discriminator": {}}
    packed: dict[str, dict[str, torch.Tensor]] = {"weight": {}, "bias": {}}
    for name, tensor in checkpoint.tensors(model).items():
        *path, last = name.split(".")
        match path:
            case ["encoder", "entry", *inner]:
                new = f"in_conv.conv.{BLOCK['.'.join(inner)]}.{last}"
            case ["encoder", "down", i, *inner]:
                new = f"down_blocks.{i}.mpconv.{BLOCK['.'.join(inner)]}.{last}"
            case ["student" | "teacher" as side, "up", i, *inner]:
                ups = "up_blocks" if side == "student" else "teacher_ups"
                new = f"{ups}.{i}.conv.{BLOCK['.'.join(inner)]}.{last}"
            case ["student" | "teacher" as side, "output"]:
                new = f"{'out_conv' if side == 'student' else 'teacher_out'}.conv.{last}"
            case ["student", "inpainting", "mixing", "output"]:
                new = f"inpaint_block.attention.out_proj.{last}"
            case ["student", "inpainting", "mixing", which]:
                packed[last][which] = tensor
                continue
            case ["student", "inpainting", "norm1" | "norm2" as norm]:
                new = f"inpaint_block.attn_{norm}.{last}"
            case ["student", "inpainting", "feed_forward", i]:
                new = f"inpaint_block.ff.{i}.{last}"
            case ["student", "inpainting", "entry" | "exit" as end, i]:
                new = f"inpaint_block.bottleneck_conv{1 if end == 'entry' else 2}.{i}.{last}"
            case ["student", *block, "memory"] if last == "pointer":
                continue
            case ["student", *block, "memory"]:
                owner = "inpaint_block" if block == ["inpainting"] else f"memory_blocks.{block[1]}"
                for place, items in enumerate(tensor):
                    parts["generator"][f"{owner}.memory.{place}.memMatrix"] = items
                continue
            case ["discriminator", "convolutions", i]:
                parts["discriminator"][f"conv_model.{max(0, 3 * int(i) - 1)}.{last}"] = tensor
                continue
            case ["discriminator", "norms", i]:
                parts["discriminator"][f"conv_model.{3 * int(i) + 3}.{last}"] = tensor
                continue
            case ["discriminator", "output"]:
                parts["discriminator"][f"regressor.{last}"] = tensor
                continue
            case _:
                raise AssertionError(name)
        parts["generator"][new] = tensor
    for last, by_name in packed.items():
        rows = torch.cat([by_name["query"], by_name["key_value"]])
        parts["generator"][f"inpaint_block.attention.in_proj_{last}"] = rows
    parts["generator"]["inpaint_block.conv.weight"] = torch.zeros(3, 3, 3, 3)
    return parts["generator"], parts["discriminator"]


def random_model(**changes) -> Model:
    made = tiny.model(**{"threshold": "exclusive", "decoder_items": 5, "heads": 8, **changes})
    with torch.no_grad():
        for value in checkpoint.tensors(made).values():
            if value.is_floating_point():
                value.copy_(torch.rand_like(value))
    return made


CASES = [
    {"patches": 4, "image_size": 64, "decoder_memory": "subpatch"},
    {"decoder_memory": "patch", "topk": 3},
    {"memory": "queue", "decoder_memory": "subpatch", "levels": 3, "image_size": 64},
    {"decoder_memory": "patch", "skip_levels": 1, "merge_levels": 1, "threshold": "inclusive"},
    {"decoder_memory": "patch", "decoder_memories": 0, "skip_levels": 0, "decoder_items": 6},
]


@pytest.mark.parametrize("changes", CASES)
def test_round_trip(changes):
    """`"subpatch"` is their V1, `"patch"` their V3."""
    model = random_model(**changes)
    config = model.config
    options = {
        name: getattr(config, name) for name in ("topk", "threshold", "memory", "decoder_memory", "merge_levels")
    }
    state = torch.get_rng_state()
    found = convert(*export(model), **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert (
        found.config == config.replace(signal="discriminator_per_image")
        and not found.training
        and found.calibration is None
    )
    own, other = checkpoint.tensors(model), checkpoint.tensors(found)
    assert own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)
    if config.memory == "queue":
        assert found.queue.pointer.item() == 0


def test_defaults_are_the_released_configuration():
    config = convert(*export(random_model(decoder_memory="subpatch"))).config
    assert (config.topk, config.threshold, config.memory, config.decoder_memory) == (
        5,
        "exclusive",
        "matrix",
        "subpatch",
    )
    assert (config.merge_levels, config.border, config.heads) == (2, "zero", 8)
    assert convert(*export(random_model(decoder_memory="subpatch")), rho=0.95).config.rho == 0.95


@pytest.fixture
def parts():
    return export(random_model(decoder_memory="patch"))


def refuse(parts, message, **changes):
    with pytest.raises(ConversionError, match=message) as caught:
        convert(*parts, **{"decoder_memory": "patch", **changes})
    assert "\n" not in str(caught.value)


KINDS = [
    *("in_conv.conv.conv1.0.weight", "down_blocks.1.mpconv.conv2.4.running_var", "up_blocks.0.conv.conv1.0.weight"),
    *("up_blocks.1.conv.conv2.0.bias", "teacher_ups.1.conv.conv2.1.weight", "out_conv.conv.weight"),
    *("memory_blocks.0.memory.0.memMatrix", "memory_blocks.1.memory.3.memMatrix", "inpaint_block.ff.3.bias"),
    *("inpaint_block.memory.1.memMatrix", "inpaint_block.memory.3.memMatrix", "inpaint_block.attn_norm2.bias"),
    *("inpaint_block.attention.in_proj_weight", "inpaint_block.attention.in_proj_bias"),
    *("inpaint_block.attention.out_proj.bias", "inpaint_block.bottleneck_conv1.0.weight", "teacher_out.conv.bias"),
]


def test_a_missing_tensor_is_named(parts):
    generator, discriminator = parts
    convert(generator, discriminator, decoder_memory="patch")
    for name in KINDS:
        rest = {k: v for k, v in generator.items() if k != name}
        assert len(rest) == len(generator) - 1
        refuse(
            (rest, discriminator),
            r"^the checkpoint \(in simsid's naming\)|^the memories of student|P x P memories .* got 3$",
        )
    rest = {k: v for k, v in discriminator.items() if k != "conv_model.6.bias"}
    refuse((generator, rest), r"naming\) lacks tensor discriminator\.norms\.1\.bias$")
    refuse(({}, {}), r"the checkpoint \(in simsid's naming\) lacks tensor student.inpainting.memory.items")


@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 3, 5)])
def test_a_misshaped_tensor_is_named(parts, shape):
    generator, discriminator = parts
    for name in KINDS:
        changed = generator | {name: torch.zeros(shape)}
        refuse(
            (changed, discriminator),
            r"^the checkpoint \(in simsid's naming\)|^the memories of student|must hold query, key and value",
        )
    changed = discriminator | {"regressor.weight": torch.zeros(shape)}
    refuse((generator, changed), r"tensor discriminator.output.weight must have shape \[1, 128\], got")


@pytest.mark.parametrize(
    "name", ["head.weight", "in_conv.conv.conv1.7.weight.more", "inpaint_block.memory.x.memMatrix"]
)
def test_unknown_tensors_are_named(parts, name):
    generator, discriminator = parts
    refuse(
        (generator | {name: torch.zeros(1)}, discriminator), f"^{re.escape(f'generator.{name}')} is not a tensor of the"
    )
    refuse(
        (generator, discriminator | {"head": torch.zeros(1)}),
        r"^discriminator\.head is not a tensor of the released",
    )
    more = {"conv_model.99.weight": torch.zeros(1)}
    refuse((generator, discriminator | more), r"has the unknown tensor discriminator\.\S+$")


def test_what_is_told_must_fit(parts):
    refuse(parts, r"student.memories.0.memory.items must have shape \[4, 5, 288\]", decoder_memory="subpatch")
    refuse(parts, r"student.inpainting.memory.items must have shape \[4, 6, 256\], got", image_size=64)
    refuse(parts, "the checkpoint's shapes fit no configuration: heads must be a divisor", heads=7)
    refuse(parts, "the checkpoint's shapes fit no configuration: 'widht' is not a configuration field", widht=3)


# Files


def test_read_takes_wrappers_off(tmp_path, parts):
    generator, discriminator = parts
    wrapped = {"state_dict": {f"module.{name}": value for name, value in generator.items()}, "epoch": 3}
    torch.save(wrapped, tmp_path / "model.pth")
    torch.save(discriminator, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    found, old = read_released(tmp_path / "model.pth"), read_released(tmp_path / "old.pth")
    assert found.keys() == generator.keys() and all(torch.equal(found[name], generator[name]) for name in found)
    assert old.keys() == discriminator.keys()
    assert convert(found, old, decoder_memory="patch").config.patches == 2


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_a_malicious_file_is_refused(tmp_path, kind):
    trap, file = tmp_path / "trap", tmp_path / "model.pth"
    content = {"weight": torch.zeros(1), "more": Malicious(trap)}
    if kind == "pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(ConversionError, match=r"model.pth is damaged or holds more than tensors") as caught:
        read_released(file)
    assert not trap.exists() and "weights_only" not in str(caught.value) and caught.value.__cause__ is None
    torch.load(file, weights_only=False) if kind != "pickle" else pickle.loads(file.read_bytes())
    assert trap.exists(), "the trap works: it was not sprung"


def test_only_tensors_are_ever_loaded(tmp_path, monkeypatch):
    seen = []

    def load(*args, **kwargs):
        seen.append(kwargs)
        return {"weight": torch.zeros(1)}

    monkeypatch.setattr(torch, "load", load)
    read_released(tmp_path / "model.pth")
    assert seen == [{"map_location": "cpu", "weights_only": True}]
    sources = pathlib.Path(released.__file__).parent.rglob("*.py")
    calls = [
        call for path in sources for call in re.findall(r"torch\.load\([^)]*\)|pickle\.loads?\(", path.read_text())
    ]
    assert len(calls) == 1 and "weights_only=True" in calls[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], r"must hold a dictionary of tensors, got list"),
        (torch.zeros(2), r"must hold a dictionary of tensors, got Tensor"),
        ({"weight": 3}, r"must hold tensors by name, got int under 'weight'"),
        ({4: torch.zeros(1)}, r"must hold tensors by name, got Tensor under 4"),
    ],
)
def test_other_contents(tmp_path, content, message):
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(ConversionError, match=f"model.pth {message}"):
        read_released(tmp_path / "model.pth")


def test_damaged_files(tmp_path):
    with pytest.raises(ConversionError, match=r"nowhere.pth does not exist"):
        read_released(tmp_path / "nowhere.pth")
    with pytest.raises(ConversionError, match="cannot be read as a PyTorch state dictionary"):
        read_released(tmp_path)
    torch.save({"weight": torch.arange(40)}, tmp_path / "good.pth", _use_new_zipfile_serialization=False)
    good, file = (tmp_path / "good.pth").read_bytes(), tmp_path / "bad.pth"
    generator = torch.Generator().manual_seed(0)
    samples = [b"", b"PK\x03\x04", b"\x80", good[:30], good[:-9], b"\x80\x02" + b")" * 9, b"\x80\x02R.", b"\x80\x02K."]
    samples += [
        torch.randint(0, 256, (64,), generator=generator, dtype=torch.uint8).numpy().tobytes() for _ in range(50)
    ]
    for content in samples:
        file.write_bytes(content)
        with pytest.raises(ConversionError, match=r"bad.pth ") as caught:
            read_released(file)
        assert "\n" not in str(caught.value), content
