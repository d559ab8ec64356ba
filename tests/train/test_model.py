"""The vision tower that is written again must be transformers', patch for patch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from medreasoner_train.model import NanoConfig, build_reasoner, merge_order, patchify, tower


@pytest.mark.parametrize("size", [168, 252])
def test_the_tower_equals_transformers_for_each_image_of_a_batch(
    size: int, toy_reasoner: Any, cut_patches: Callable[[Tensor, int, int], Tensor]
) -> None:
    visual = toy_reasoner.model.visual
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    side = size // 14
    with torch.no_grad():
        ours = tower(visual, images)
        for image, own in zip(images, ours, strict=True):
            theirs = visual(cut_patches(image, 14, 2), grid_thw=torch.tensor([[1, side, side]])).pooler_output
            assert own.shape == theirs.shape == ((side // 2) ** 2, 32)
            torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_the_tower_lets_every_image_alone(toy_reasoner: Any) -> None:
    images = torch.randn(2, 3, 84, 84, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        both, single = tower(toy_reasoner.model.visual, images), tower(toy_reasoner.model.visual, images[1:])
    torch.testing.assert_close(both[1:], single)


def test_patches_follow_each_other_in_merge_blocks(cut_patches: Callable[[Tensor, int, int], Tensor]) -> None:
    images = torch.arange(2 * 3 * 12 * 12, dtype=torch.float32).view(2, 3, 12, 12)
    ours = patchify(images, patch=3, merge=2)
    for image, own in zip(images, ours, strict=True):
        expected = cut_patches(image, 3, 2).view(16, 3, 2, 9)[:, :, 0].flatten(1)  # one of the two equal frames
        assert torch.equal(own, expected)


def test_merge_order_names_row_and_column_of_each_patch() -> None:
    expected = [
        [0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3],
        [2, 0], [2, 1], [3, 0], [3, 1], [2, 2], [2, 3], [3, 2], [3, 3],
    ]  # fmt: skip
    assert merge_order(4, 2).tolist() == expected


def test_rotary_sections_that_do_not_fill_the_head_are_refused() -> None:
    with pytest.raises(ValueError, match="mrope_section"):
        build_reasoner(NanoConfig(mrope_section=(8, 8, 8)), vocab_size=10, tokens={})
