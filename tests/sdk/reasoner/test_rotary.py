"""Positions and rotary tables, against transformers' Qwen2.5-VL."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLModel,
    Qwen2_5_VLTextModel,
    apply_rotary_pos_emb,
)

from medreasoner.reasoner.rotary import prompt_positions, rotary_tables, text_positions

IMAGE = 99
MERGE = 2


def config(head_dim: int = 24, sections: tuple[int, int, int] = (4, 4, 4), theta: float = 1e4) -> Qwen2_5_VLConfig:
    text = {
        "vocab_size": 128,
        "hidden_size": head_dim * 2,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta, "mrope_section": list(sections)},
    }
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": head_dim * 2}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=98)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9), st.integers(1, 12), st.integers(1, 12), st.integers(0, 9))
def test_positions_equal_transformers(before: int, rows: int, columns: int, after: int) -> None:
    model = Qwen2_5_VLModel.__new__(Qwen2_5_VLModel)  # get_rope_index needs the configuration only
    torch.nn.Module.__init__(model)
    model.config = config()
    ids = [1] * before + [IMAGE] * (rows * columns) + [2] * after
    tensor = torch.tensor([ids])
    expected, deltas = model.get_rope_index(
        tensor,
        mm_token_type_ids=(tensor == IMAGE).int(),
        image_grid_thw=torch.tensor([[1, rows * MERGE, columns * MERGE]]),
    )
    positions, following = prompt_positions(ids, IMAGE, rows, columns)
    np.testing.assert_array_equal(positions, expected[:, 0].numpy())
    if after:  # transformers counts what follows from the largest position, which text after the image defines
        assert following == len(ids) + int(deltas[0, 0])


def test_text_alone_counts_up_on_every_axis() -> None:
    positions, following = prompt_positions([1, 2, 3], IMAGE, 2, 2)
    assert positions.tolist() == [[0, 1, 2]] * 3
    assert following == 3
    assert text_positions(5, 2).tolist() == [[5, 6]] * 3


@pytest.mark.parametrize("ids", [[IMAGE] * 3, [IMAGE, IMAGE, 1, IMAGE, IMAGE]], ids=["too few", "two runs"])
def test_an_image_of_another_size_is_refused(ids: list[int]) -> None:
    with pytest.raises(ValueError, match="image tokens"):
        prompt_positions(ids, IMAGE, 2, 2)


@pytest.mark.parametrize(
    ("head_dim", "sections", "theta"), [(64, (8, 12, 12), 1e4), (128, (16, 24, 24), 1e6), (24, (4, 4, 4), 1e4)]
)
def test_tables_rotate_as_transformers_does(head_dim: int, sections: tuple[int, int, int], theta: float) -> None:
    rng = np.random.default_rng(3)
    positions = rng.integers(0, 700, (3, 9))
    model = Qwen2_5_VLTextModel(config(head_dim, sections, theta).text_config)
    x = torch.randn(1, 2, 9, head_dim, generator=torch.Generator().manual_seed(0))
    cos, sin = model.rotary_emb(x, torch.from_numpy(positions)[:, None])
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin)
    ours_cos, ours_sin = rotary_tables(positions, head_dim=head_dim, theta=theta, sections=sections)
    assert ours_cos.dtype == ours_sin.dtype == np.float32
    first, second = np.split(x.numpy(), 2, axis=-1)
    rotated = np.concatenate([first * ours_cos - second * ours_sin, second * ours_cos + first * ours_sin], axis=-1)
    np.testing.assert_allclose(rotated, expected.numpy(), atol=2e-4)
