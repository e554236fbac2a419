"""Reads the checkpoints of the released SimSID code: `model.pth` and `discriminator.pth`."""

import math
import os
import pickle
import re
from typing import Any, Literal

import torch
from torch import Tensor

from simsid import checkpoint
from simsid.config import PAPERS_SCORE, Config
from simsid.errors import CheckpointError, ConfigError, ConversionError
from simsid.models.model import Model

BLOCK = {"conv1.0": "entry.0", "conv1.1": "entry.1", "conv2.0": "inner.0", "conv2.1": "inner.1"} | {
    "conv2.3": "outer.0",
    "conv2.4": "outer.1",
}
"""Names inside a convolution block, theirs to ours."""

RULES: list[tuple[str, str]] = [
    (r"generator\.in_conv\.conv\.(conv\d\.\d)\.(\w+)", "encoder.entry.{0}.{1}"),
    (r"generator\.down_blocks\.(\d+)\.mpconv\.(conv\d\.\d)\.(\w+)", "encoder.down.{0}.{1}.{2}"),
    (r"generator\.up_blocks\.(\d+)\.conv\.(conv\d\.\d)\.(\w+)", "student.up.{0}.{1}.{2}"),
    (r"generator\.teacher_ups\.(\d+)\.conv\.(conv\d\.\d)\.(\w+)", "teacher.up.{0}.{1}.{2}"),
    (r"generator\.out_conv\.conv\.(\w+)", "student.output.{0}"),
    (r"generator\.teacher_out\.conv\.(\w+)", "teacher.output.{0}"),
    (r"generator\.inpaint_block\.bottleneck_conv1\.(\d)\.(\w+)", "student.inpainting.entry.{0}.{1}"),
    (r"generator\.inpaint_block\.bottleneck_conv2\.(\d)\.(\w+)", "student.inpainting.exit.{0}.{1}"),
    (r"generator\.inpaint_block\.attention\.out_proj\.(\w+)", "student.inpainting.mixing.output.{0}"),
    (r"generator\.inpaint_block\.attn_norm([12])\.(\w+)", "student.inpainting.norm{0}.{1}"),
    (r"generator\.inpaint_block\.ff\.(\d)\.(\w+)", "student.inpainting.feed_forward.{0}.{1}"),
    (r"discriminator\.regressor\.(\w+)", "discriminator.output.{0}"),
]
"""Names that keep their tensor, theirs to ours."""

UNUSED = r"generator\.inpaint_block\.conv\.\w+"
"""Tensors that the released code holds and never uses."""

DISCRIMINATOR = re.compile(r"discriminator\.conv_model\.(\d+)\.(\w+)")
PACKED = re.compile(r"generator\.inpaint_block\.attention\.in_proj_(weight|bias)")
ITEMS = re.compile(r"generator\.(inpaint_block|memory_blocks\.(\d+))\.memory\.(\d+)\.memMatrix")


def read_released(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read one `.pth` with `weights_only=True`: tensors by name, without `module.` or an outer `state_dict`."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConversionError(f"{os.fspath(path)} does not exist") from None
    except pickle.UnpicklingError:
        # PyTorch's own message offers to load the file with its code executed.
        raise ConversionError(
            f"{os.fspath(path)} is damaged or holds more than tensors, and nothing but tensors is read"
        ) from None
    except Exception as error:  # a damaged file fails in the unpickler in a dozen ways, some without a message
        strerror = getattr(error, "strerror", None)
        reason = strerror or "it is damaged, or torch.save did not write it"
        raise ConversionError(f"{os.fspath(path)} cannot be read as a PyTorch state dictionary: {reason}") from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise ConversionError(f"{os.fspath(path)} must hold a dictionary of tensors, got {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ConversionError(
                f"{os.fspath(path)} must hold tensors by name, got {type(value).__name__} under {name!r}"
            )
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def convert(
    generator: dict[str, Tensor],
    discriminator: dict[str, Tensor],
    *,
    topk: int = 5,
    threshold: Literal["inclusive", "exclusive"] = "exclusive",
    memory: Literal["matrix", "queue"] = "matrix",
    decoder_memory: Literal["patch", "subpatch"] = "subpatch",
    merge_levels: int = 2,
    **overrides: object,
) -> Model:
    """Build a model from the released generator's and discriminator's tensors.

    Sizes come from the shapes. What shapes do not determine is an argument: `topk` is their `shrink_thres`,
    `"subpatch"` and `"patch"` their `'V1'` and `'V3'`; whether the in-painting memory is a queue; at P = 2 also
    `decoder_memory`. A queue's write pointer is not in the files; it starts at 0.

    Raises:
        ConversionError: a tensor is missing, unknown or of a shape that does not fit.
    """
    tensors = {f"generator.{name}": value for name, value in generator.items()}
    tensors |= {f"discriminator.{name}": value for name, value in discriminator.items()}
    renamed = _rename(tensors)
    try:
        config = Config(
            **_sizes(renamed),
            topk=topk,
            threshold=threshold,
            memory=memory,
            decoder_memory=decoder_memory,
            merge_levels=merge_levels,
            signal=PAPERS_SCORE,
        ).replace(**overrides)
    except ConfigError as error:
        raise ConversionError(f"the checkpoint's shapes fit no configuration: {error}") from None
    with torch.random.fork_rng(devices=[]):
        model = Model(config)
    if memory == "queue":
        renamed["student.inpainting.memory.pointer"] = torch.zeros((), dtype=torch.int64)
    try:
        checkpoint.load_state(model, renamed, "the checkpoint (in simsid's naming)")
    except CheckpointError as error:
        raise ConversionError(str(error)) from None
    return model.eval()


def renamed_names(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Return their name to ours for every tensor (prefixes included) that is only renamed."""
    found = {}
    for name in tensors:
        if match := DISCRIMINATOR.fullmatch(name):
            found[name] = _discriminator_name(int(match[1]), match[2])
        for pattern, target in RULES:
            if match := re.fullmatch(pattern, name):
                found[name] = target.format(*(BLOCK.get(part, part) for part in match.groups()))
    return found


def _discriminator_name(position: int, parameter: str) -> str:
    # The sequence is conv, activation, then conv, norm, activation four times.
    if position == 0:
        return f"discriminator.convolutions.0.{parameter}"
    block, part = divmod(position - 2, 3)
    return (
        f"discriminator.convolutions.{block + 1}.{parameter}"
        if part == 0
        else f"discriminator.norms.{block}.{parameter}"
    )


def _rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    simple = renamed_names(tensors)
    renamed: dict[str, Tensor] = {}
    items: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        if name in simple:
            renamed[simple[name]] = tensor
        elif match := PACKED.fullmatch(name):
            if not tensor.dim() or len(tensor) % 3:
                raise ConversionError(f"{name} must hold query, key and value, got shape {list(tensor.shape)}")
            query, key_value = tensor.split([len(tensor) // 3, len(tensor) - len(tensor) // 3])
            renamed[f"student.inpainting.mixing.query.{match[1]}"] = query
            renamed[f"student.inpainting.mixing.key_value.{match[1]}"] = key_value
        elif match := ITEMS.fullmatch(name):
            block = "student.inpainting" if match[2] is None else f"student.memories.{match[2]}"
            items.setdefault(f"{block}.memory.items", {})[int(match[3])] = tensor
        elif not re.fullmatch(UNUSED, name):
            raise ConversionError(f"{name} is not a tensor of the released code")
    for name, by_location in items.items():
        parts = [by_location[location] for location in sorted(by_location)]
        if max(by_location) >= len(parts) or len({part.shape for part in parts}) != 1:
            raise ConversionError(f"the memories of {name} (in simsid's naming) must be numbered from 0 and equal")
        renamed[name] = torch.stack(parts)
    return renamed


def _sizes(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the configuration's sizes, from the shapes."""

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if name not in tensors:
            raise ConversionError(f"the checkpoint (in simsid's naming) lacks tensor {name}")
        found = tuple(tensors[name].shape)
        if len(found) != axes or 0 in found:
            raise ConversionError(
                f"the checkpoint (in simsid's naming): tensor {name} must have {axes} filled axes, got {list(found)}"
            )
        return found

    levels = len({name.split(".")[2] for name in tensors if name.startswith("encoder.down.")})
    decoders = len({name.split(".")[2] for name in tensors if name.startswith("student.memories.")})
    L, items, D = shape("student.inpainting.memory.items", 3)
    patches = math.isqrt(L)
    if patches**2 != L:
        raise ConversionError(f"the checkpoint must hold P x P memories in its in-painting block, got {L}")
    channels = shape("student.inpainting.entry.0.weight", 4)[0]
    side = math.isqrt(D // channels)
    skips, deeper = 0, 4 * channels
    for level in range(levels):
        narrow, seen = shape(f"student.up.{level}.entry.0.weight", 4)[:2]
        skips += seen == narrow + deeper
        deeper = narrow
    return {
        "image_size": patches * side * 2**levels,
        "patches": patches,
        "width": shape("encoder.entry.entry.0.weight", 4)[0],
        "discriminator_width": shape("discriminator.convolutions.0.weight", 4)[0],
        "levels": levels,
        "skip_levels": skips,
        "items": items,
        "decoder_items": shape("student.memories.0.memory.items", 3)[1] if decoders else items,
        "decoder_memories": decoders,
    }
