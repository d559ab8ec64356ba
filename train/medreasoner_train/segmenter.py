"""Trains nano's segmenter, a small SAM, on boxes and points with the errors that a reasoner makes:
``medreasoner-cli train segmenter``.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import SamConfig, SamModel

from medreasoner.errors import MedReasonerError
from medreasoner_train.augment import NO_CHANGE, Augmented, Options, augment
from medreasoner_train.checkpoint import load_weights
from medreasoner_train.data import Sample, by_image, load_index, split
from medreasoner_train.loop import LoopOptions, moved, train, write_settings
from medreasoner_train.model import to_tensor
from medreasoner_train.store import DRAWS, Stored, load_store, redraws, sampling_weights
from medreasoner_train.targets import box_of, depth_at

__all__ = ["SegmenterOptions", "build_segmenter", "run"]

logger = logging.getLogger(__name__)

SIZE = 256
BOTH, BOX, POINTS = 0, 1, 2

# How far a prompt is off, in shares of the box's sides; each is as frequent as the others.
ERRORS = (0.0, 0.04, 0.12, 0.22)


def build_segmenter() -> Any:
    """A randomly initialised ``SamModel`` of nano's sizes: 256 px, 16 x 16 tokens, masks of 64 x 64."""
    config = SamConfig(
        vision_config={
            "image_size": SIZE, "patch_size": 16, "hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3,
            "mlp_dim": 768, "output_channels": 128, "window_size": 8, "global_attn_indexes": [2, 5],
            "num_pos_feats": 64,
        },
        prompt_encoder_config={"hidden_size": 128, "image_size": SIZE, "patch_size": 16, "mask_input_channels": 16},
        mask_decoder_config={
            "hidden_size": 128, "mlp_dim": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
            "attention_downsample_rate": 2, "iou_head_hidden_dim": 128,
        },
    )  # fmt: skip
    model = SamModel(config)
    model.apply(_start)
    # transformers scales the random waves of positions by half the hidden size, where the original SAM has 1: so fast
    # that neighbouring places look unrelated. Image and prompts must share them.
    with torch.no_grad():
        waves = torch.randn(2, config.vision_config.num_pos_feats)
        model.shared_image_embedding.positional_embedding.copy_(waves)
        model.prompt_encoder.shared_embedding.positional_embedding.copy_(waves)
    return model


def _start(module: nn.Module) -> None:
    """Ordinary initial weights: transformers' default for SAM is so small that activations are denormal numbers."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.1)
    elif hasattr(module, "pos_embed") and isinstance(module.pos_embed, nn.Parameter):
        nn.init.normal_(module.pos_embed, std=0.02)


@dataclasses.dataclass(slots=True, kw_only=True)
class Prompts:
    """P prompts over B images.

    image : (P,) int64, whose image; boxes : (P, 4), points : (P, 2, 2) float32 in segmenter pixels; form : (P,) int64,
    0 box and points, 1 box only, 2 points only; masks : (P, S, S) bool.
    """

    image: Tensor
    boxes: Tensor
    points: Tensor
    form: Tensor
    masks: Tensor


class SegmenterData:
    """Makes batches of images with prompts."""

    def __init__(self, stored: Sequence[Stored], *, emphasis: Mapping[str, float] | None = None) -> None:
        self.stored = list(stored)
        self.weights = sampling_weights(self.stored, emphasis)

    def batch(self, step: int, *, count: int, per_image: int, seed: int) -> tuple[Tensor, Prompts]:
        """Images (B, 3, S, S) in [-1, 1] and B * per_image prompts, with errors of every size."""
        rng = np.random.default_rng([seed, step])
        images, rows = [], []
        for b, index in enumerate(rng.choice(len(self.stored), size=count, p=self.weights)):
            changed, kept = self._shown(int(index), rng)
            images.append(to_tensor(changed.pixels))
            for k in rng.choice(kept, size=per_image, replace=len(kept) < per_image):
                mask, exact = changed.masks[k], changed.points[k]
                box, points = disturb(np.array(box_of(mask)), exact, depth_at(mask, exact), rng)
                rows.append((b, box, points, int(rng.choice(3, p=[0.7, 0.15, 0.15])), mask))
        return torch.stack(images), prompts(rows)

    def _shown(self, index: int, rng: np.random.Generator) -> tuple[Augmented, list[int]]:
        """An augmented image and which of its masks are left; another one where all vanish at this size."""
        for chosen in redraws(index, self.weights, rng):
            item = self.stored[chosen]
            changed = augment(
                item.pixels, item.masks, item.points,
                size=SIZE, modality=item.record.modality, source=item.record.source, rng=rng, options=Options(),
            )  # fmt: skip
            kept = [k for k in range(len(changed.masks)) if changed.masks[k].any()]
            if kept:
                return changed, kept
        raise MedReasonerError(f"no structure is left in {DRAWS} images drawn at {SIZE} px")


def disturb(
    box: npt.NDArray[np.float64],
    points: npt.NDArray[np.float64],
    depth: npt.NDArray[np.float64],
    rng: np.random.Generator,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """A quarter of the prompts stay exact, the others are off by as much as nano's reasoner is.

    Its boxes of a true IoU of 0.4 to 0.6 have corners that are off by a fifth of a side, and points that follow the
    box's centre by half: a segmenter that knows such errors looks for the structure instead of filling the box. Points
    are moved by shares of the box, but where the target is thin, by shares of its own width: a point far off a vessel
    says nothing about it. `depth` (2,) is how far they lie inside the target.
    """
    error = ERRORS[int(rng.integers(len(ERRORS)))]
    sides = np.tile(box[2:] - box[:2], 2)
    moved = np.clip(box + rng.standard_normal(4) * error * sides, 0, SIZE)
    if (moved[2:] - moved[:2] < 4).any():
        moved = box
    reach = np.minimum(sides[:2], 4 * np.maximum(depth, 1.0)[:, None])
    followed = ((moved - box) / sides).reshape(2, 2).mean(0) / 2
    shifted = np.clip(points + (followed + rng.standard_normal((2, 2)) * error) * reach, 0, SIZE)
    return moved, shifted


def prompts(rows: Sequence[tuple[int, Any, Any, int, npt.NDArray[np.bool_]]]) -> Prompts:
    """Join (image, box, points, form, mask) rows."""
    return Prompts(
        image=torch.tensor([row[0] for row in rows]),
        boxes=torch.tensor(np.stack([row[1] for row in rows]), dtype=torch.float32),
        points=torch.tensor(np.stack([row[2] for row in rows]), dtype=torch.float32),
        form=torch.tensor([row[3] for row in rows]),
        masks=torch.from_numpy(np.stack([row[4] for row in rows])),
    )


def box_mask(boxes: Tensor, *, side: int = 64) -> Tensor:
    """The mask prompt that goes with a box: (P, 4) in segmenter pixels -> (P, 1, side, side) float32.

    Of each cell's centre, the distance to the nearest side in cells, positive inside, clipped to [-4, 4] and halved. A
    SAM takes mask prompts beside points and boxes; with the box drawn into one, a small model need not learn from few
    images to tell inside from outside by comparing position waves. The exported decoder draws it itself.
    """
    centres = torch.arange(side, device=boxes.device) + 0.5
    x1, y1, x2, y2 = (boxes * (side / SIZE)).unbind(-1)
    across = torch.minimum(centres - x1[:, None], x2[:, None] - centres)  # (P, side)
    down = torch.minimum(centres - y1[:, None], y2[:, None] - centres)
    nearest = torch.minimum(across[:, None, :], down[:, :, None])
    return (nearest.clamp(-4, 4) / 2)[:, None]


def segment(model: Any, images: Tensor, given: Prompts) -> tuple[Tensor, Tensor, Tensor]:
    """Mask logits (P, 64, 64), predicted IoU (P,) and the order of the prompts' rows (P,)."""
    embeddings = model.vision_encoder(images).last_hidden_state
    dense_position = model.get_image_wide_positional_embeddings()
    logits, scores, order = [], [], []
    for form in (BOTH, BOX, POINTS):
        rows = (given.form == form).nonzero()[:, 0]
        if not len(rows):
            continue
        points = given.points[rows][:, None] if form != BOX else None
        labels = torch.ones_like(points[..., 0], dtype=torch.int64) if points is not None else None
        boxes = given.boxes[rows][:, None] if form != POINTS else None
        sparse, dense = model.prompt_encoder(
            input_points=points,
            input_labels=labels,
            input_boxes=boxes,
            input_masks=None if form == POINTS else box_mask(given.boxes[rows]),
        )
        masks, iou = model.mask_decoder(
            image_embeddings=embeddings[given.image[rows]],
            image_positional_embeddings=dense_position.expand(len(rows), -1, -1, -1),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense if form != POINTS else dense.expand(len(rows), -1, -1, -1),
            multimask_output=False,
        )[:2]
        logits.append(masks[:, 0, 0])
        scores.append(iou[:, 0, 0])
        order.append(rows)
    return torch.cat(logits), torch.cat(scores), torch.cat(order)


def mask_loss(model: Any, images: Tensor, given: Prompts) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy and Dice of the masks on a 128 x 128 grid, and the error of the predicted IoU."""
    logits, score, order = segment(model, images, given)
    truth = functional.avg_pool2d(given.masks[order][:, None].float(), 2)[:, 0]  # (P, 128, 128), in [0, 1]
    logits = functional.interpolate(logits[:, None], size=truth.shape[-2:], mode="bilinear")[:, 0]
    entropy = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean((1, 2))
    hit = torch.sigmoid(logits)
    dice = 1 - (2 * (hit * truth).sum((1, 2)) + 1) / (hit.sum((1, 2)) + truth.sum((1, 2)) + 1)
    with torch.no_grad():
        mine, real = logits > 0, truth > 0.5
        shared, union = (mine & real).sum((1, 2)), (mine | real).sum((1, 2))
        iou = shared / union.clamp(min=1)
        exact = (2 * shared / (mine.sum((1, 2)) + real.sum((1, 2))).clamp(min=1)).mean()
    loss_iou = functional.mse_loss(score, iou)
    loss = 2 * entropy.mean() + dice.mean() + loss_iou
    return loss, {"entropy": entropy.mean().detach(), "dice": exact, "iou_error": loss_iou.detach()}


@torch.no_grad()
def evaluate(model: Any, data: SegmenterData) -> dict[str, float]:
    """Mean Dice on the 256 x 256 grid with the true box and points."""
    rng = np.random.default_rng(0)
    dice: dict[str, list[float]] = {}
    for start in range(0, len(data.stored), 16):
        images, rows, names = [], [], []
        for b, item in enumerate(data.stored[start : start + 16]):
            plain = augment(
                item.pixels, item.masks, item.points,
                size=SIZE, modality=item.record.modality, source=item.record.source, rng=rng, options=NO_CHANGE,
            )  # fmt: skip
            images.append(to_tensor(plain.pixels))
            for sample, mask, points in zip(item.record.samples, plain.masks, plain.points, strict=True):
                if mask.any():
                    rows.append((b, np.array(box_of(mask)), points, BOTH, mask))
                    names.append(sample.key)
        device = next(model.parameters()).device
        given = moved(prompts(rows), device)
        logits, _, order = segment(model, torch.stack(images).to(device), given)
        mine = functional.interpolate(logits[:, None], size=(SIZE, SIZE), mode="bilinear")[:, 0] > 0
        real = given.masks[order]
        value = 2 * (mine & real).sum((1, 2)) / (mine.sum((1, 2)) + real.sum((1, 2)))
        for at, own in zip(order.tolist(), value.tolist(), strict=True):
            dice.setdefault(names[at], []).append(own)
    for key, own in sorted(dice.items()):
        logger.info("  %-38s %4d  %.3f", key, len(own), np.mean(own))
    return {"val_dice": float(np.mean([v for own in dice.values() for v in own]))}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SegmenterOptions:
    """One run of the segmenter's training.

    `emphasis`: sources of the data to draw so many times as often; `start`: the folder of a finished segmenter;
    `frozen_encoder`: only prompt encoder and mask decoder learn; `reasoner`: a checkpoint of nano's kind, whose own
    answers are the prompts of a `written` share of the images.
    """

    data: Path
    loop: LoopOptions
    images: int = 12
    per_image: int = 3
    emphasis: Mapping[str, float] = dataclasses.field(default_factory=dict)
    start: Path | None = None
    frozen_encoder: bool = False
    reasoner: Path | None = None
    written: float = 0.5
    cache: Path | None = None
    eval_every: int = 300


def run(options: SegmenterOptions) -> None:
    """Train from the last checkpoint to the end and write the Hugging Face form to ``out/checkpoint``."""
    torch.manual_seed(options.loop.seed)
    train_samples, val_samples = split(load_index(options.data))
    stored = load_store(by_image(train_samples), cache=options.cache)
    train_data = SegmenterData(stored, emphasis=options.emphasis)
    val_data = SegmenterData(load_store(by_image(val_samples), cache=options.cache))
    model = build_segmenter()
    if options.start is not None:
        load_weights(options.start, model)
    model.vision_encoder.requires_grad_(not options.frozen_encoder)
    train(
        modules={"segmenter": model},
        make_batch=_batches(options, train_samples, train_data),
        loss_of=lambda batch: mask_loss(model, *batch),
        options=options.loop,
        evaluate=lambda _: evaluate(model, val_data),
        eval_every=options.eval_every,
    )
    save_segmenter(model, options.loop.out / "checkpoint")


def _batches(
    options: SegmenterOptions, samples: list[Sample], data: SegmenterData
) -> Callable[[int], tuple[Tensor, Prompts]]:
    """How the batch of a step is made."""
    seed, per_image = options.loop.seed, options.per_image
    if options.reasoner is None:
        return lambda step: data.batch(step, count=options.images, per_image=per_image, seed=seed)
    from medreasoner_train.written import written_prompts  # which reads this module

    source = written_prompts(options.reasoner, samples, data.stored)
    count = round(options.images * options.written)

    def make(step: int) -> tuple[Tensor, Prompts]:
        images, given = data.batch(step, count=options.images - count, per_image=per_image, seed=seed)
        others, found = source.batch(step, count=count, per_image=per_image, seed=seed)
        return (images, given) if found is None else (torch.cat([images, others]), joined(given, found, len(images)))

    return make


def joined(first: Prompts, second: Prompts, images: int) -> Prompts:
    """Two batches of prompts as one, the second's images behind the first's `images`."""
    later = dataclasses.replace(second, image=second.image + images)
    names = [field.name for field in dataclasses.fields(Prompts)]
    return Prompts(**{name: torch.cat([getattr(first, name), getattr(later, name)]) for name in names})


def save_segmenter(model: Any, out: Path) -> None:
    """Write the Hugging Face form in bfloat16, and ``medreasoner.json``: what export must know beside."""
    model.to(torch.bfloat16).save_pretrained(out)
    settings = {
        "resize": {"rule": "stretch", "width": SIZE, "height": SIZE},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "prompts": "joint",
        "multimask": False,
        "box_mask": True,
    }
    write_settings(out, settings)
