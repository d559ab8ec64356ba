"""Comparisons of a bundle's segmenter with transformers, stage by stage."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medreasoner._extras import require
from medreasoner.bundle import Bundle
from medreasoner.drawing import load_drawing
from medreasoner.errors import BundleError
from medreasoner.geometry import Placement
from medreasoner.image_tower import load_image_tower
from medreasoner.kernel_session import runs_without_graph
from medreasoner.providers import usable_cores
from medreasoner.spec import SegmenterSpec
from medreasoner_export.parity_road import Segment
from medreasoner_export.report import KERNEL_TOLERANCES, ParityStage, compare, stated

__all__ = ["mask_of", "segmenter_stages"]

N_IMAGES = 2
TOLERANCES = {"fp16": 0.03, "int8": 0.1, "int4": 0.5}
"""Accepted error of what an image encoder of that precision sees, and of the masks that follow.

The reference is not rounded. In four bits a Hiera of random weights loses a third of a mask's IoU; a faulty graph all.
"""

Array = npt.NDArray[Any]


def segmenter_stages(bundle: Bundle, checkpoint_path: Path, *, tolerance: float, seed: int) -> Iterator[ParityStage]:
    """Compare image embeddings, mask logits and predicted IoU for the bundle's form of prompts, and the final masks.

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
    require("transformers", extra="export", feature="The parity check")
    ort = require("onnxruntime", extra="cpu", feature="The parity check")
    spec = bundle.spec.segmenter
    from medreasoner_export.sam_reference import by_output, load_sam

    sam, embed = load_sam(checkpoint_path, image_size=spec.resize.sides[0])
    size = _image_size(sam, spec, checkpoint_path)
    generator = np.random.default_rng(seed)
    pixels = generator.standard_normal((N_IMAGES, 3, size, size), dtype=np.float32)
    encoder, decoder = (
        ort.InferenceSession(str(bundle.path(name)), providers=["CPUExecutionProvider"])
        for name in (spec.graphs.encoder, spec.graphs.decoder)
    )
    tolerance = max(tolerance, TOLERANCES.get(stated(bundle.path(spec.graphs.encoder), "precision") or "", 0.0))
    box, points = _prompts(generator, size)
    names = [output.name for output in encoder.get_outputs()]
    with torch.inference_mode():
        embeddings = embed(torch.from_numpy(pixels))
        expected = by_output(embeddings)
        if expected.keys() != set(names):
            raise BundleError(f"{checkpoint_path}: it gives {', '.join(expected)}, the bundle's encoder {names}")
        result = _predict(
            sam, embeddings, spec, box, points, box_mask=stated(bundle.path(spec.graphs.decoder), "box_mask") == "true"
        )
    features = dict(zip(names, encoder.run(None, {"pixel_values": pixels}), strict=True))
    for name in names:
        yield compare(name.replace("_", " "), features[name], expected[name].numpy(), tolerance)
    inputs = {**features, **_for_graph(spec, box, points)}
    masks, iou = decoder.run(["mask_logits", "predicted_iou"], inputs)
    del encoder, decoder  # this frame may outlive its use by a cycle, and the reasoner's graphs need the memory
    yield compare("mask logits", masks, result.pred_masks[:, 0].numpy(), tolerance)
    yield compare("predicted IoU", iou, result.iou_scores[:, 0].numpy(), tolerance)
    yield _mask_stage(masks, result.pred_masks[:, 0].numpy(), size, tolerance)
    tower, drawing = spec.tower, spec.drawing
    if tower is not None and runs_without_graph(tower):
        seen = load_image_tower(bundle.path(tower.file), spec, tower, n_threads=usable_cores())
        found = seen.run({"pixel_values": pixels})["image_embedding"]
        limit = max(tolerance, KERNEL_TOLERANCES[seen.products])
        yield compare("image embedding without the graph", found, expected["image_embedding"].numpy(), limit)
    if drawing is not None and runs_without_graph(drawing):
        drawn = load_drawing(bundle.path(drawing.file), spec, drawing).run(inputs)
        limit = max(tolerance, KERNEL_TOLERANCES["bfloat16"])
        for words, key, theirs in (
            ("mask logits", "mask_logits", result.pred_masks), ("predicted IoU", "predicted_iou", result.iou_scores),
        ):  # fmt: skip
            yield compare(f"{words} without the graph", drawn[key], theirs[:, 0].numpy(), limit)


def _image_size(sam: Any, spec: SegmenterSpec, checkpoint_path: Path) -> int:
    """Side of the images that the checkpoint takes, in pixels, if it is the bundle's."""
    prompts = sam.config.prompt_encoder_config
    side = 4 * prompts.image_size // prompts.patch_size
    if side != spec.mask_size:
        raise BundleError(
            f"{checkpoint_path}: its masks have {side} pixels a side, those of the bundle {spec.mask_size}"
        )
    return int(prompts.image_size)


def mask_of(bundle: Bundle, checkpoint_path: Path) -> Segment:
    """What the checkpoint of a bundle's segmenter makes of an image, a box and two points."""
    torch = require("torch", extra="export", feature="The parity check")
    require("transformers", extra="export", feature="The parity check")
    from medreasoner_export.sam_reference import load_sam

    spec = bundle.spec.segmenter
    sam, embed = load_sam(checkpoint_path, image_size=spec.resize.sides[0])
    box_mask = stated(bundle.path(spec.graphs.decoder), "box_mask") == "true"

    def segment(planes: Array, grid: Placement, corners: Array, points: Array) -> npt.NDArray[np.bool_]:
        box, inside = (grid.to_grid(each)[None].astype(np.float32) for each in (corners, points))
        result = _predict(sam, embed(torch.from_numpy(planes[None])), spec, box, inside, box_mask=box_mask)
        best = int(result.iou_scores[0, 0].argmax())
        logits = result.pred_masks[0, :, best : best + 1]  # (1, 1, side, side)
        side = logits.shape[-1]
        # Pixel centres of the image in the logits, from -1 at the centre of the first to 1 at that of the last.
        y, x = (
            ((torch.arange(count) + 0.5) * (extent / count) - 0.5) * 2 / (side - 1) - 1
            for count, extent in zip((grid.image_height, grid.image_width), grid.mask_crop(side), strict=True)
        )
        places = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)[None].to(logits.dtype)
        sampled = torch.nn.functional.grid_sample(logits, places, padding_mode="border", align_corners=True)
        mask: npt.NDArray[np.bool_] = sampled[0, 0].numpy() > 0
        return mask

    return segment


def _predict(sam: Any, embeddings: Any, spec: SegmenterSpec, box: Array, points: Array, *, box_mask: bool) -> Any:
    """What transformers makes of a box (N, 2, 2) and points (N, n, 2) in the grid; it pads the prompts itself."""
    torch = require("torch", extra="export", feature="The parity check")
    size, found = int(sam.config.prompt_encoder_config.image_size), {}
    if spec.prompts != "box":
        found["input_points"] = torch.from_numpy(points)[:, None]
        found["input_labels"] = torch.ones((len(points), 1, points.shape[1]), dtype=torch.int64)
    if spec.prompts != "points":
        found["input_boxes"] = torch.from_numpy(box.reshape(len(box), 1, 4))
        if box_mask:
            found["input_masks"] = torch.from_numpy(_drawn(box, size, spec.mask_size))
    return sam(image_embeddings=embeddings, multimask_output=spec.n_masks > 1, **found)


def _for_graph(spec: SegmenterSpec, box: Array, points: Array) -> dict[str, Array]:
    """The same as the decoder takes them: SAM adds a padding point where there is no box, SAM 2 always."""
    with_box, with_points = spec.prompts != "points", spec.prompts != "box"
    padded = spec.architecture == "sam2" or not with_box
    places = [points] * with_points + [box] * with_box + [np.zeros((N_IMAGES, 1, 2), np.float32)] * padded
    kinds = [1] * points.shape[1] * with_points + [2, 3] * with_box + [-1] * padded
    return {"points": np.concatenate(places, axis=1), "labels": np.tile(kinds, (N_IMAGES, 1))}


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
