"""Patches: locations row-major, patch index fastest, and put together as they were cut."""

import pytest
import torch

from simsid.models import patches


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("P", [1, 2, 3, 4])
def test_split_against_slices(P, layout):
    images = torch.randn(3, 2, 12, 24).contiguous(memory_format=layout)
    cut = patches.split(images, P)
    assert cut.shape == (3 * P * P, 2, 12 // P, 24 // P)
    for b in range(3):
        for i in range(P):
            for j in range(P):
                window = images[b, :, i * 12 // P : (i + 1) * 12 // P, j * 24 // P : (j + 1) * 24 // P]
                assert torch.equal(cut[b * P * P + i * P + j], window)


@pytest.mark.parametrize("P", [1, 2, 3, 4])
def test_merge_is_the_inverse(P):
    images = torch.randn(2, 3, 12, 12)
    assert torch.equal(patches.merge(patches.split(images, P), P), images)
    maps = torch.randn(2 * P * P, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert torch.equal(patches.split(patches.merge(maps, P), P), maps)
