"""The vision graph's index inputs, against transformers' and against brute force."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionRotaryEmbedding
from transformers.vision_utils import get_vision_window_index

from medreasoner.reasoner.vision import VisionGrid, vision_grid

PATCH, MERGE = 14, 2


def grid(rows: int, columns: int, window: int = 84, head_dim: int = 64) -> VisionGrid:
    return vision_grid(
        height=rows * PATCH * MERGE,
        width=columns * PATCH * MERGE,
        patch=PATCH,
        merge=MERGE,
        window=window,
        head_dim=head_dim,
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 11), st.integers(1, 11), st.sampled_from([28, 56, 84, 112]))
def test_windows_hold_the_same_patches_as_transformers(rows: int, columns: int, window: int) -> None:
    index, edges = get_vision_window_index(torch.tensor([[1, rows * MERGE, columns * MERGE]]), MERGE, window, PATCH)
    tokens = torch.as_tensor(index)
    patches = (tokens[:, None] * MERGE**2 + torch.arange(MERGE**2)).flatten().tolist()
    expected = {
        frozenset(patches[start:end])
        for start, end in zip(edges.tolist(), edges.tolist()[1:], strict=False)
        if start < end
    }
    ours = grid(rows, columns, window)
    found = {
        frozenset(gather[bias[0, 0] == 0].tolist())
        for gather, bias in zip(ours.window_gather, ours.window_bias, strict=True)
    }
    assert found == expected
    assert len(found) == len(ours.window_gather)  # no window is empty


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 11), st.integers(1, 11), st.sampled_from([28, 56, 84, 112]))
def test_scatter_undoes_gather(rows: int, columns: int, window: int) -> None:
    ours = grid(rows, columns, window)
    patches = np.arange(ours.n_tokens * MERGE**2)
    np.testing.assert_array_equal(patches[ours.window_gather].reshape(-1)[ours.window_scatter], patches)
    assert ours.window_gather.dtype == ours.window_scatter.dtype == np.int64
    side = window // PATCH // MERGE * MERGE
    fullest = min(side, rows * MERGE) * min(side, columns * MERGE)  # never more than there are patches
    assert ours.window_bias.shape == (len(ours.window_gather), 1, 1, fullest)
    assert (ours.window_bias.squeeze()[ours.window_bias.squeeze() < 0] <= -1e9).all()


@pytest.mark.parametrize(("rows", "columns"), [(9, 9), (3, 7), (1, 1)])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_rotary_tables_equal_transformers(rows: int, columns: int, head_dim: int) -> None:
    places = [
        (block_row * MERGE + row, block_column * MERGE + column)
        for block_row in range(rows)
        for block_column in range(columns)
        for row in range(MERGE)
        for column in range(MERGE)
    ]
    rotary = Qwen2_5_VLVisionRotaryEmbedding(Qwen2_5_VLVisionConfig(hidden_size=head_dim * 2, num_heads=2))
    # (n_patches, head_dim): rows and columns of the patches, as the tower's forward hands them over
    cos, sin = rotary(torch.zeros(1), torch.tensor(places))
    ours = grid(rows, columns, head_dim=head_dim)
    np.testing.assert_allclose(ours.rotary_cos, cos.numpy(), atol=1e-5)
    np.testing.assert_allclose(ours.rotary_sin, sin.numpy(), atol=1e-5)
