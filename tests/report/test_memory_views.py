"""The drawings of memories, and which stored images are shown beside which."""

import numpy as np
import pytest
import torch
from tiny_features import memory, normal

from simsid import data
from simsid.models import MemoryContents
from simsid.report import embedding
from simsid.report.memory import MemoryViews, section, stored_neighbors


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_mixing_is_one_for_items_among_the_features_and_zero_apart():
    features = draw(0, 30, 2, 60)
    among = embedding.embed("", draw(1, 2, 40, 60), features)
    apart = embedding.embed("", draw(1, 2, 40, 60) + 20, features)
    assert among.mixing == pytest.approx(1, abs=0.15) and apart.mixing == 0
    assert among.items.shape == (80, 2) and among.features.shape == (60, 2)
    gap = np.linalg.norm(apart.items.mean(0) - apart.features.mean(0))
    assert gap > 2 * np.linalg.norm(among.items.mean(0) - among.features.mean(0))


def test_embedding_is_repeatable_and_bounded(monkeypatch):
    monkeypatch.setattr(embedding, "POINTS", 25)
    one, other = (embedding.embed("", draw(1, 2, 40, 60), draw(0, 30, 2, 60)) for _ in range(2))
    assert np.array_equal(one.items, other.items) and len(one.items) == len(one.features) == 25


def test_dead_items_and_too_few_look_ups_are_told(monkeypatch):
    monkeypatch.setattr(embedding, "POINTS", 10)
    uses = torch.tensor([[3, 0, 1], [2, 2, 0], [1, 1, 2], [1, 2, 1]])
    arguments = {"items": draw(0, 4, 3, 4), "queries": draw(1, 5, 4, 4), "weight": uses.double(), "kept": 2}
    contents = MemoryContents("m", "learned items", uses=uses, images=2, **arguments)
    (entry,) = section(MemoryViews([contents]))["memories"]
    assert (entry["dead"], entry["few"], entry["decoded"]) == (2, False, [])
    (entry,) = section(MemoryViews([MemoryContents("m", "x", uses=uses // 3, images=1, **arguments)]))["memories"]
    assert entry["few"]


def test_images_are_shown_with_the_training_images_nearest_to_them():
    images = normal(20)
    records = [data.Record(f"a/{i}.png", "train", 0) for i in range(20)]
    train = data.ImageSet(images, tuple(records))
    model = memory().fit(train)
    (first, second) = stored_neighbors(model, train, train, [4, 7])
    near = model.nearest_images(images[[4, 7]])
    assert (first.name, second.name) == ("4.png", "7.png")
    assert [name for name, _ in first.nearest] == [f"{i}.png" for i in near[0].tolist()]
    assert np.array_equal(second.nearest[0][1], images[near[1, 0], 0].numpy())
    assert stored_neighbors(model, train.select(slice(0, 3)), train, [4, 7]) == [], "images were added to the memory"
