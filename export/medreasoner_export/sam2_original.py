"""SAM 2 as facebookresearch/sam2 stores it: recognised, measured and renamed; MedSAM2 and other fine-tuned copies too.

The weights do not tell everything: attention heads, windows and which blocks see the whole grid stand in that project's
configurations, so only the published sizes are known here. Nor do they tell the size of the images.

References
----------
``sam2/configs/sam2.1`` and ``sam2/modeling`` of facebookresearch/sam2; bowang-lab/MedSAM2, which keeps both.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medreasoner.errors import BundleError
from medreasoner_export.checkpoint import Entry, Weights
from medreasoner_export.graph import joined
from medreasoner_export.sam2_config import Sam2Config
from medreasoner_export.sam_original import Shapes, last_layers, renamed

__all__ = ["is_sam2_file", "sam2_name", "sam2_weights"]

TRUNK = "image_encoder.trunk."
PROBE = TRUNK + "patch_embed.proj.weight"
KINDS = [f"sam_prompt_encoder.point_embeddings.{index}.weight" for index in range(4)]
CODES = "positional_embedding"

RENAMED: Mapping[str, str] = {
    TRUNK + "patch_embed.proj.": "vision_encoder.backbone.patch_embed.projection.",
    TRUNK: "vision_encoder.backbone.",
    "image_encoder.neck.": "vision_encoder.neck.",
    "no_mem_embed": "no_memory_embedding",
}


@dataclass(frozen=True, slots=True)
class _Size:
    """What a published configuration says beside the weights."""

    name: str
    heads: int
    global_blocks: tuple[int, ...]
    windows: tuple[int, ...] = (8, 4, 14, 7)


# By the channels of the first stage and the blocks of all.
SIZES: Mapping[tuple[int, tuple[int, ...]], _Size] = {
    (96, (1, 2, 7, 2)): _Size("tiny", 1, (5, 7, 9)),
    (96, (1, 2, 11, 2)): _Size("small", 1, (7, 10, 13)),
    (112, (2, 3, 16, 3)): _Size("base-plus", 2, (12, 16, 20)),
    (144, (2, 6, 36, 4)): _Size("large", 2, (23, 33, 43), (8, 4, 16, 8)),
}


def is_sam2_file(entries: Mapping[str, Entry]) -> bool:
    """Whether the tensors of a file are those of a SAM 2."""
    return PROBE in entries


def sam2_name(config: Sam2Config) -> str | None:
    """``"tiny"``, ``"small"``, ``"base-plus"`` or ``"large"``; None for a size that was not published."""
    size = SIZES.get((config.dims[0], config.depths))
    return size.name if size else None


def sam2_weights(path: Path, entries: Mapping[str, Entry]) -> Weights:
    """The weights of a file under their names in transformers' ``Sam2Model``.

    Raises
    ------
    BundleError
        If they are those of no published size, or a part is missing; the message names the file.
    """
    config = _config(Shapes(path, {name: entry.shape for name, entry in entries.items()}))
    last = last_layers([_plain(name) for name in entries])
    found = {_renamed(name, last): entry for name, entry in entries.items() if name not in KINDS}
    found["prompt_encoder.point_embed.weight"] = _stacked([entries[name] for name in KINDS])
    if len(found) + len(KINDS) - 1 < len(entries):
        raise BundleError(f"{path}: it holds a tensor twice, under two names that mean the same")
    codes = found.get(f"shared_image_embedding.{CODES}")
    if codes is not None:  # transformers has one for the image's places and one for the points
        found[f"prompt_encoder.shared_embedding.{CODES}"] = codes
    return Weights(path, config, found, [path])


def _plain(name: str) -> str:
    return name.removeprefix("sam_") if name.startswith(("sam_mask_decoder.", "sam_prompt_encoder.")) else name


def _renamed(name: str, last: Mapping[str, str]) -> str:
    name = _plain(name)
    for old, new in RENAMED.items():
        if name.startswith(old):
            name = new + name[len(old) :]
            break
    else:
        name = renamed(name, last).replace(".out_proj.", ".o_proj.")
    name = re.sub(r"(blocks\.\d+\.)norm(\d)\.", r"\1layer_norm\2.", name)
    name = re.sub(r"(neck\.convs\.\d+\.)conv\.", r"\1", name)
    for index, part in (("0", "proj_in"), ("1", "proj_out")):
        name = re.sub(rf"((?:blocks|transformer\.layers)\.\d+\.mlp\.)layers\.{index}\.", rf"\g<1>{part}.", name)
    return name


def _stacked(rows: Sequence[Entry]) -> Entry:
    """Tensors of one shape as one, along the first axis."""
    shape = (sum(entry.shape[0] for entry in rows), *rows[0].shape[1:])
    return replace(rows[0], shape=shape, read=lambda: joined([entry.read() for entry in rows]))


def _config(shapes: Shapes) -> dict[str, Any]:
    """What ``config.json`` of the same model says in transformers, but for the size of the images."""
    channels = shapes.of("image_encoder.neck.convs.0.conv.weight", 4)[0]
    for name in KINDS:  # they become one tensor
        if shapes.of(name, 2) != (1, channels):
            raise BundleError(f"{shapes.path}: {name}: expected shape {(1, channels)}, got {shapes.of(name, 2)}")
    iou = "sam_mask_decoder.iou_prediction_head.layers."
    layer = "sam_mask_decoder.transformer.layers.0."
    attended = shapes.of(layer + "cross_attn_token_to_image.q_proj.weight", 2)[0]
    hiera = _hiera(shapes)
    return {
        "model_type": "sam2",
        "vision_config": {
            "backbone_config": hiera,
            "backbone_channel_list": hiera["embed_dim_per_stage"][::-1],
            "fpn_hidden_size": channels,
        },
        "prompt_encoder_config": {
            "hidden_size": channels,
            "mask_input_channels": shapes.of("sam_prompt_encoder.mask_downscaling.3.weight", 4)[0],
        },
        "mask_decoder_config": {
            "hidden_size": channels,
            "mlp_dim": shapes.of(layer + "mlp.layers.0.weight", 2)[0],
            "attention_downsample_rate": channels // attended,
            "num_multimask_outputs": shapes.of("sam_mask_decoder.mask_tokens.weight", 2)[0] - 1,
            "iou_head_depth": shapes.count(iou),
            "iou_head_hidden_dim": shapes.of(iou + "0.weight", 2)[0],
        },
    }


def _hiera(shapes: Shapes) -> dict[str, Any]:
    """The sizes of the image encoder."""
    n_blocks = shapes.count(TRUNK + "blocks.")
    # A stage begins where a block has a projection of what passes it by.
    starts = [index for index in range(n_blocks) if f"{TRUNK}blocks.{index}.proj.weight" in shapes.shapes]
    depths = tuple(end - start for start, end in zip([0, *starts], [*starts, n_blocks], strict=True))
    first = shapes.of(PROBE, 4)[0]
    size = SIZES.get((first, depths))
    if size is None:
        known = ", ".join(f"{each.name} ({dim}: {blocks})" for (dim, blocks), each in SIZES.items())
        raise BundleError(
            f"{shapes.path}: a Hiera of {first} channels with stages of {depths} blocks is none of {known}; its heads "
            "and windows do not stand in the weights: store it as transformers' Sam2Model, with its config.json"
        )
    doublings = [2**stage for stage in range(len(depths))]
    return {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": first,
        "num_attention_heads": size.heads,
        "embed_dim_per_stage": [first * times for times in doublings],
        "blocks_per_stage": list(depths),
        "num_attention_heads_per_stage": [size.heads * times for times in doublings],
        "window_size_per_stage": list(size.windows),
        "global_attention_blocks": list(size.global_blocks),
        "window_positional_embedding_background_size": list(shapes.of(TRUNK + "pos_embed", 4)[2:]),
    }
