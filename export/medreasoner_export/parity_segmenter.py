"""Comparisons of a bundle's segmenter with transformers, stage by stage."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medreasoner._extras import require
from medreasoner.bundle import Bundle
from medreasoner_export.report import ParityStage, compare, load_reference
from medreasoner_export.sam_original import open_sam
from medreasoner_export.segmenter import TWICE

__all__ = ["segmenter_stages"]

N_IMAGES = 2

Array = npt.NDArray[Any]


def segmenter_stages(bundle: Bundle, checkpoint_path: Path, *, tolerance: float, seed: int) -> Iterator[ParityStage]:
    """Compare image embeddings, mask logits and predicted IoU for a box with two points, and the final masks.

    Parameters
    ----------
    bundle
        A loaded bundle.
    checkpoint_path
        The checkpoint that the bundle was made of.
    tolerance
        Largest accepted error, relative to the reference's largest value; for masks, of the lost IoU.
    seed
        Of the images and prompts.
    """
    torch = require("torch", extra="export", feature="The parity check")
    transformers = require("transformers", extra="export", feature="The parity check")
    ort = require("onnxruntime", extra="cpu", feature="The parity check")
    spec = bundle.spec.segmenter
    sam = _reference(torch, transformers, checkpoint_path)
    size = sam.config.vision_config.image_size
    generator = np.random.default_rng(seed)
    pixels = generator.standard_normal((N_IMAGES, 3, size, size), dtype=np.float32)
    encoder, decoder = (
        ort.InferenceSession(str(bundle.path(name)), providers=["CPUExecutionProvider"])
        for name in (spec.graphs.encoder, spec.graphs.decoder)
    )
    # As the graph was made: a setting given at the export may differ from the checkpoint's own.
    box_mask = decoder.get_modelmeta().custom_metadata_map.get("box_mask") == "true"
    box, points = _prompts(generator, size)
    with torch.inference_mode():
        expected = sam.get_image_embeddings(torch.from_numpy(pixels))
        result = sam(
            image_embeddings=expected,
            input_points=torch.from_numpy(points)[:, None],
            input_labels=torch.ones((N_IMAGES, 1, points.shape[1]), dtype=torch.int64),
            input_boxes=torch.from_numpy(box.reshape(N_IMAGES, 1, 4)),
            input_masks=torch.from_numpy(_drawn(box, size, spec.mask_size)) if box_mask else None,
            multimask_output=spec.n_masks > 1,
        )
    embedding = encoder.run(None, {"pixel_values": pixels})[0]
    yield compare("image embedding", embedding, expected.numpy(), tolerance)
    labels = np.tile(np.array([1] * points.shape[1] + [2, 3]), (N_IMAGES, 1))
    prompts = {"points": np.concatenate([points, box], axis=1), "labels": labels}
    masks, iou = decoder.run(["mask_logits", "predicted_iou"], {"image_embedding": embedding, **prompts})
    yield compare("mask logits", masks, result.pred_masks[:, 0].numpy(), tolerance)
    yield compare("predicted IoU", iou, result.iou_scores[:, 0].numpy(), tolerance)
    yield _mask_stage(masks, result.pred_masks[:, 0].numpy(), size, tolerance)


def _reference(torch: Any, transformers: Any, path: Path) -> Any:
    """The checkpoint as transformers runs it."""
    if path.is_dir():
        return load_reference(transformers.SamModel, path, dtype=torch.float32).eval()
    weights = open_sam(path)
    state = {name: torch.from_numpy(weights.tensor(name, shape).copy()) for name, shape in weights.shapes.items()}
    state[TWICE] = state["shared_image_embedding.positional_embedding"]
    adapters = [name for name in state if ".Adapter." in name]
    branches = {name: state.pop(name).float() for name in adapters}
    sam = transformers.SamModel(transformers.SamConfig.from_dict(weights.config))
    sam.load_state_dict(state)
    if adapters:
        for index, layer in enumerate(sam.vision_encoder.layers):
            start = f"vision_encoder.layers.{index}.Adapter."
            own = {name.removeprefix(start): value for name, value in branches.items() if name.startswith(start)}
            layer.mlp.register_forward_hook(partial(_with_adapter, torch.nn.functional, own))
    return sam.float().eval()


def _with_adapter(nn: Any, weights: Mapping[str, Any], _mlp: Any, inputs: tuple[Any, ...], output: Any) -> Any:
    """Output of a layer's MLP with that of SAM-Med2D's adapter beside it, of images (B, H, W, C)."""
    (x,) = inputs
    planes = x.permute(0, 3, 1, 2)
    gate = nn.linear(nn.relu(nn.linear(x.mean((1, 2)), weights["channel.0.weight"])), weights["channel.2.weight"])
    y = planes * gate.sigmoid()[:, :, None, None]
    y = nn.relu(nn.conv2d(y, weights["spatial.0.weight"], stride=2, padding=1))
    y = nn.relu(nn.conv_transpose2d(y, weights["spatial.2.weight"], stride=2, padding=1))
    y = (planes + y).permute(0, 2, 3, 1)
    return output + nn.layer_norm(y, y.shape[-1:], weights["norm.weight"], weights["norm.bias"])


def _prompts(generator: np.random.Generator, size: int) -> tuple[Array, Array]:
    """A box (N, 2, 2) with two points (N, 2, 2) in it for each image, in pixels."""
    corners = generator.uniform(0.1, 0.4, (N_IMAGES, 1, 2))
    sides = generator.uniform(0.3, 0.5, (N_IMAGES, 1, 2))
    box = np.concatenate([corners, corners + sides], axis=1)
    points = corners + sides * generator.uniform(0.2, 0.8, (N_IMAGES, 2, 2))
    return (box * size).astype(np.float32), (points * size).astype(np.float32)


def _drawn(box: Array, size: int, side: int) -> Array:
    """(N, 1, side, side) mask prompts of boxes (N, 2, 2): see ``box_mask`` in :func:`sam_decoder_graph`."""
    inside = np.empty((len(box), 1, side, side), np.float32)
    for n, (low, high) in enumerate(box * (side / size)):
        for row in range(side):
            for column in range(side):
                x, y = column + 0.5, row + 0.5
                inside[n, 0, row, column] = min(x - low[0], high[0] - x, y - low[1], high[1] - y)
    return np.clip(inside, -4.0, 4.0) / 2.0


def _mask_stage(found: Array, expected: Array, size: int, tolerance: float) -> ParityStage:
    """Lost IoU of the masks at the size of the image, the worst of all."""
    torch = require("torch", extra="export", feature="The parity check")
    full = [
        torch.nn.functional.interpolate(torch.from_numpy(logits), (size, size), mode="bilinear").numpy() > 0.0
        for logits in (found, expected)
    ]
    both, either = (full[0] & full[1]).sum(axis=(2, 3)), (full[0] | full[1]).sum(axis=(2, 3))
    lost = 1.0 - np.where(either == 0, 1.0, both / np.maximum(either, 1))
    # A pixel whose logit is within the accepted error of zero may fall on either side.
    allowed = max(tolerance, 1e-3)
    return ParityStage(name="final mask", error=float(lost.max()), scale=1.0, tolerance=allowed, unit="1 - IoU")
