"""SAM as the ``segment-anything`` package stores it: recognised, measured and renamed from the weights alone.

References
----------
The names and shapes are those of ``segment_anything.modeling`` (facebookresearch/segment-anything), which MedSAM keeps
and SAM-Med2D (OpenGVLab/SAM-Med2D) extends by adapters.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from medreasoner._text import printable
from medreasoner.errors import BundleError
from medreasoner_export.checkpoint import Entry, Weights, numbered

__all__ = ["Shapes", "last_layers", "renamed", "sam_weights"]

ENCODER, DECODER, PROMPTS = "image_encoder.", "mask_decoder.", "prompt_encoder."
PROBES = (DECODER + "iou_token.weight", PROMPTS + "no_mask_embed.weight", ENCODER + "neck.0.weight")
TINY_VIT = ENCODER + "patch_embed.seq.0.c.weight"
# LiteMedSAM's code holds these.
TINY_VIT_IMAGE, TINY_VIT_GRID = 256, 64
# Not in the weights, and one number in every published model.
DECODER_HEADS = 8
# torch's default, which the decoder's norms have there; transformers' classes say 1e-6.
DECODER_EPSILON = 1e-5

# Names in transformers, by the names in the original's sequences of unnamed layers.
NUMBERED: Mapping[str, Mapping[str, str]] = {
    "neck": {"0": "conv1", "1": "layer_norm1", "2": "conv2", "3": "layer_norm2"},
    "mask_downscaling": {"0": "conv1", "1": "layer_norm1", "3": "conv2", "4": "layer_norm2", "6": "conv3"},
    "output_upscaling": {"0": "upscale_conv1", "1": "upscale_layer_norm", "3": "upscale_conv2"},
}
RENAMED: Mapping[str, str] = {
    ENCODER + "patch_embed.proj.": "vision_encoder.patch_embed.projection.",
    ENCODER + "blocks.": "vision_encoder.layers.",
    ENCODER: "vision_encoder.",
    PROMPTS + "pe_layer.positional_encoding_gaussian_matrix": "shared_image_embedding.positional_embedding",
    PROMPTS + "point_embeddings.": PROMPTS + "point_embed.",
    DECODER + "transformer.norm_final_attn.": DECODER + "transformer.layer_norm_final_attn.",
}


def sam_weights(path: Path, entries: Mapping[str, Entry]) -> Weights:
    """The weights of a file under their names in transformers' ``SamModel``.

    Raises
    ------
    BundleError
        If it holds no SAM; the message names the file.
    """
    missing = [name for name in PROBES if name not in entries]
    if missing:
        raise BundleError(
            f"{path}: the architecture is not recognised: every SAM of segment-anything has {missing[0]}, "
            f"this file {printable(next(iter(entries), 'nothing'))[:120]}"
        )
    config = _config(Shapes(path, {name: entry.shape for name, entry in entries.items()}))
    last = last_layers(entries)
    found = {renamed(name, last): entry for name, entry in entries.items()}
    if len(found) < len(entries):
        raise BundleError(f"{path}: it holds a tensor twice, under two names that mean the same")
    return Weights(path, config, found, [path])


def last_layers(names: Iterable[str]) -> dict[str, str]:
    """Number of the last layer of each small head of the decoder, by the beginning of their names."""
    pattern = re.compile(r"(mask_decoder\..+)\.layers\.\d+\.weight$")
    depths = Counter(match[1] for name in names if (match := pattern.match(name)))
    return {name: str(depth - 1) for name, depth in depths.items()}


def renamed(name: str, last: Mapping[str, str]) -> str:
    """Name in transformers, with the numbers of :func:`last_layers`."""
    if head := re.match(r"(mask_decoder\.(?!transformer).+)\.layers\.(\d+)\.(.+)", name):
        start, index, part = head.groups()
        middle = "proj_in" if index == "0" else "proj_out" if index == last.get(start) else f"layers.{int(index) - 1}"
        return f"{start}.{middle}.{part}"
    if row := re.match(r"(.+\.)(neck|mask_downscaling|output_upscaling)\.(\d)\.(.+)", name):
        start, sequence, index, part = row.groups()
        held = {"neck": "neck.", "mask_downscaling": "mask_embed.", "output_upscaling": ""}[sequence]
        name = f"{start}{held}{NUMBERED[sequence].get(index, index)}.{part}"
    for old, new in RENAMED.items():
        if name.startswith(old):
            name = new + name[len(old) :]
            break
    return re.sub(r"(\.layers\.\d+\.)norm(\d)\.", r"\1layer_norm\2.", name)


class Shapes:
    """Sizes of the tensors of a file, refused by name if one is not as expected.

    Raises
    ------
    BundleError
        From every method.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.path, self.shapes = path, shapes

    def of(self, name: str, rank: int) -> tuple[int, ...]:
        """The shape of a tensor of so many dimensions."""
        found = self.shapes.get(name)
        if found is None or len(found) != rank or 0 in found:
            raise BundleError(f"{self.path}: {name}: expected {rank} dimensions, got {found}")
        return found

    def count(self, start: str) -> int:
        """How many numbered parts follow `start`; at least one."""
        found = numbered(self.path, self.shapes, start)
        if not found:
            raise BundleError(f"{self.path}: {start}: there are none")
        return found


def _config(shapes: Shapes) -> dict[str, Any]:
    """What ``config.json`` of the same model says in transformers."""
    vision = _tiny_vit(shapes) if TINY_VIT in shapes.shapes else _vit(shapes)
    channels = shapes.of(ENCODER + "neck.0.weight", 4)[0]
    grid = {"hidden_size": channels, "image_size": vision["image_size"], "patch_size": vision["patch_size"]}
    first = DECODER + "transformer.layers.0."
    attended = shapes.of(first + "cross_attn_token_to_image.q_proj.weight", 2)[0]
    iou = DECODER + "iou_prediction_head.layers."
    return {
        "model_type": "sam",
        "vision_config": {**vision, "output_channels": channels, "num_pos_feats": channels // 2},
        "prompt_encoder_config": {
            **grid,
            "mask_input_channels": shapes.of(PROMPTS + "mask_downscaling.3.weight", 4)[0],
        },
        "mask_decoder_config": {
            "hidden_size": channels,
            "mlp_dim": shapes.of(first + "mlp.lin1.weight", 2)[0],
            "num_hidden_layers": shapes.count(DECODER + "transformer.layers."),
            "num_attention_heads": DECODER_HEADS,
            "attention_downsample_rate": channels // attended,
            "num_multimask_outputs": shapes.of(DECODER + "mask_tokens.weight", 2)[0] - 1,
            "iou_head_depth": shapes.count(iou),
            "iou_head_hidden_dim": shapes.of(iou + "0.weight", 2)[0],
            "layer_norm_eps": DECODER_EPSILON,
        },
    }


def _vit(shapes: Shapes) -> dict[str, Any]:
    """The sizes of SAM's image encoder."""
    hidden, _, patch, _ = shapes.of(ENCODER + "patch_embed.proj.weight", 4)
    grid = shapes.of(ENCODER + "pos_embed", 4)[1]
    block = ENCODER + "blocks.{}."
    layers = shapes.count(ENCODER + "blocks.")
    offsets = [shapes.of(block.format(index) + "attn.rel_pos_h", 2) for index in range(layers)]
    sides = [(rows + 1) // 2 for rows, _ in offsets]
    windows = sorted({side for side in sides if side != grid})
    head = offsets[0][1]
    if len(windows) > 1 or hidden % head:
        raise BundleError(
            f"{shapes.path}: attention windows of {windows} patches and heads of {head} do not fit one SAM"
        )
    sizes: dict[str, Any] = {
        "image_size": grid * patch,
        "patch_size": patch,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // head,
        "mlp_dim": shapes.of(block.format(0) + "mlp.lin1.weight", 2)[0],
        "window_size": windows[0] if windows else grid,
        "global_attn_indexes": [index for index, side in enumerate(sides) if side == grid],
        "qkv_bias": block.format(0) + "attn.qkv.bias" in shapes.shapes,
    }
    adapter = block.format(0) + "Adapter.channel.0.weight"
    if adapter in shapes.shapes:  # of SAM-Med2D; transformers knows none
        if grid % 2:
            raise BundleError(f"{shapes.path}: adapters want an even number of patches along a side, got {grid}")
        sizes["adapter_dim"] = shapes.of(adapter, 2)[0]
    return sizes


def _tiny_vit(shapes: Shapes) -> dict[str, Any]:
    """Those of LiteMedSAM's that the decoder and a description need; its graph measures the rest."""
    if shapes.of(TINY_VIT, 4)[2:] != (1, 1):
        raise BundleError(
            f"{shapes.path}: a TinyViT that shrinks the image first, such as MobileSAM's, is not supported"
        )
    blocks = sum(shapes.count(f"{ENCODER}layers.{index}.blocks.") for index in range(shapes.count(ENCODER + "layers.")))
    return {
        "image_size": TINY_VIT_IMAGE,
        "patch_size": TINY_VIT_IMAGE // TINY_VIT_GRID,
        "hidden_size": shapes.of(ENCODER + "neck.0.weight", 4)[1],
        "num_hidden_layers": blocks,
        "num_attention_heads": 1,  # it differs from stage to stage
    }
