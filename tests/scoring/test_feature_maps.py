"""Maps of features of a frozen encoder: their peak lies where an anomaly is planted, and they depend on the encoder."""

import pytest
import torch
from tiny_features import SIZES, TinyEncoder, memory, normal
from torch.nn import functional as F

import simsid
from simsid import data
from simsid.models import MAPS, LocationKNN, PaDiM, PatchCore


def planted(images, side, each, seed=7):
    """Return `each` copies of every image with a square that is too bright, and the square's corner."""
    generator, found, corners = torch.Generator().manual_seed(seed), [], []
    for image in images:
        for _ in range(each):
            row, column = torch.randint(1, image.shape[-1] - side, (2,), generator=generator).tolist()
            changed = image.clone()
            changed[:, row : row + side, column : column + side] += 1.2
            found.append(changed.clamp(-1, 1))
            corners.append((row, column))
    return torch.stack(found), corners


def hit_rate(maps, corners, side, cell):
    """Return the fraction of maps whose peak lies in a location, `cell` pixels wide, that the square reaches into."""
    hits = 0
    for heat, corner in zip(maps, corners):
        starts = [n // cell * cell for n in divmod(int(heat.argmax()), heat.shape[1])]
        hits += all(own < first + cell and first < own + side for first, own in zip(starts, corner))
    return hits / len(corners)


def build(kind, seed=0):
    """Return a fitted model on a tiny random encoder."""
    if kind is simsid.FeatureMemory:
        return memory(encoder=TinyEncoder(seed)).fit(normal(60))
    return kind(encoder=TinyEncoder(seed), **{**SIZES, "inputs": "gray"}).fit(normal(60))


kinds = pytest.mark.parametrize(
    "kind", [simsid.FeatureMemory, LocationKNN, PaDiM, PatchCore], ids=lambda kind: kind.kind
)


@kinds
def test_peak_lies_at_the_location_of_a_planted_anomaly_where_the_map_claims_it(kind):
    images, corners = planted(normal(48, 5), side=7, each=1)
    model = build(kind)
    name = model.map_names[0]
    rate = hit_rate(model.maps(images, name), corners, side=7, cell=8)
    print(f"{name}: peak at a location of the anomaly in {rate:.0%} of {len(corners)} images")
    assert rate > (0.8 if MAPS[name].localizes else 0.6)


def test_peak_of_the_shipped_model_lies_at_the_location_of_an_anomaly_planted_in_radiographs():
    model = simsid.load("zhanglab")
    records = [record for record in data.read_csv(data.SAMPLES) if record.label == 0]
    films = data.load_images(records, **model.preprocessing.to_dict()).batch(slice(None))
    images, corners = planted(films, side=32, each=7)
    rate = hit_rate(model.maps(images, "inpainting"), corners, side=32, cell=32)
    print(f"inpainting of the shipped model: {rate:.0%} of {len(corners)} radiographs")
    assert rate > 0.8


@kinds
def test_map_changes_with_another_random_encoder(kind):
    images, _ = planted(normal(4, 5), side=7, each=1)
    one, other = (model.maps(images, model.map_names[0]) for model in (build(kind), build(kind, seed=1)))
    one, other = (heat.flatten(1) - heat.flatten(1).mean(1, keepdim=True) for heat in (one, other))
    assert F.cosine_similarity(one, other).max() < 0.999
