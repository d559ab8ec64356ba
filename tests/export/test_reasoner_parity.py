"""The reasoner's graphs against transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medreasoner.bundle import Bundle
from medreasoner.reasoner.vision import vision_grid
from medreasoner_export.parity_reasoner import DecoderRun, reasoner_stages

TOLERANCE = 1e-5
GRIDS = {
    "the model's own": (9, 9),
    "one window": (4, 4),
    "ragged": (5, 6),
    "wide": (2, 11),
    "one token": (1, 1),
    "a strip": (1, 3),
}


def vision_inputs(bundle: Bundle, rows: int, columns: int) -> dict[str, Any]:
    v = bundle.spec.reasoner.vision
    unit = v.patch_size * v.merge_size
    size = {"height": rows * unit, "width": columns * unit}
    grid = vision_grid(**size, patch=v.patch_size, merge=v.merge_size, window=v.window_size, head_dim=v.head_dim)
    return dict(grid.inputs())


def reference(qwen: Any, patches: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """(batch, n_tokens, D) from transformers' own tower, an image at a time."""
    outputs = []
    for image in patches:
        frames = np.repeat(image.reshape(len(image), 3, 1, -1), 2, axis=2).reshape(len(image), -1)
        grid = torch.tensor([[1, 2 * rows, 2 * columns]])
        with torch.inference_mode():
            outputs.append(qwen.model.visual(torch.from_numpy(frames), grid).pooler_output.numpy())
    return np.stack(outputs)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="module")
def patches() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((3, 324, 588), dtype=np.float32)


@pytest.mark.parametrize(("rows", "columns"), GRIDS.values(), ids=GRIDS.keys())
def test_vision_equals_transformers_on_any_grid(
    bundle: Bundle, qwen: Any, sessions: Any, patches: np.ndarray, rows: int, columns: int
) -> None:
    patches = patches[:, : 4 * rows * columns]
    inputs = vision_inputs(bundle, rows, columns)
    found = sessions["reasoner/vision"].run(None, {"patches": patches, **inputs})[0]
    assert relative_error(found, reference(qwen, patches, rows, columns)) < TOLERANCE


@pytest.mark.parametrize(
    "name", ["patches", "rotary_cos", "rotary_sin", "window_gather", "window_bias", "window_scatter"]
)
def test_vision_parity_breaks_when_an_input_is_disturbed(
    bundle: Bundle, qwen: Any, sessions: Any, patches: np.ndarray, name: str
) -> None:
    inputs = {"patches": patches[:1], **vision_inputs(bundle, 9, 9)}
    disturbed = inputs[name].copy()
    if name == "window_bias":
        disturbed[:] = 0.0  # padding takes part
    elif disturbed.dtype == np.int64:
        flat = disturbed.reshape(-1)
        flat[[0, 1]] = flat[[1, 0]]
        if name == "window_gather":  # swapping within a window and scattering back would undo itself partly
            flat[0] = flat[2]
    else:
        disturbed[..., 0] *= 0.5  # of the fastest frequency
    found = sessions["reasoner/vision"].run(None, inputs | {name: disturbed})[0]
    assert relative_error(found, reference(qwen, patches[:1], 9, 9)) > 100 * TOLERANCE


def test_an_image_does_not_depend_on_its_batch(bundle: Bundle, sessions: Any, patches: np.ndarray) -> None:
    inputs, session = vision_inputs(bundle, 9, 9), sessions["reasoner/vision"]
    together = session.run(None, {"patches": patches, **inputs})[0]
    alone = session.run(None, {"patches": patches[2:], **inputs})[0]
    assert relative_error(together[2:], alone) < TOLERANCE


def test_hidden_states_and_tokens_equal_transformers(bundle: Bundle, toy: Path) -> None:
    stages = list(reasoner_stages(bundle, toy / "reasoner", tolerance=TOLERANCE, seed=3))
    assert [stage.name for stage in stages if not stage.passed] == []
    assert len(stages) == 8


def test_rows_of_different_length_decode_as_if_alone(bundle: Bundle, sessions: Any) -> None:
    spec, session = bundle.spec.reasoner, sessions["reasoner/decoder"]
    generator = np.random.default_rng(2)
    tokens = generator.standard_normal((2, 12, spec.hidden_dim), dtype=np.float32)
    places = np.broadcast_to(np.arange(12), (3, 2, 12))
    lengths = (9, 5)
    alone = []
    for row, length in enumerate(lengths):
        run = DecoderRun(session, spec)
        run.step(tokens[[row], :length], places[:, [row], :length])
        alone.append(run.step(tokens[[row], length : length + 1], places[:, [row], length : length + 1])[0])
    both = DecoderRun(session, spec, batch=2)
    both.step(tokens[:, :9], places[:, :, :9])  # the second row is padded at its right
    both.lengths[:] = lengths
    step = np.stack([tokens[row, length] for row, length in enumerate(lengths)])[:, None]
    at = np.array(lengths)[None, :, None].repeat(3, axis=0)
    assert relative_error(both.step(step, at), np.stack(alone)) < TOLERANCE


def test_the_decoder_depends_on_each_axis_of_position(bundle: Bundle, sessions: Any) -> None:
    spec, session = bundle.spec.reasoner, sessions["reasoner/decoder"]
    tokens = np.random.default_rng(4).standard_normal((1, 6, spec.hidden_dim), dtype=np.float32)
    places = np.broadcast_to(np.arange(6), (3, 1, 6)).copy()
    plain = DecoderRun(session, spec).step(tokens, places)
    for axis in range(3):
        moved = places.copy()
        moved[axis, 0, 3] += 7
        assert relative_error(DecoderRun(session, spec).step(tokens, moved), plain) > 1e-3
