"""SAM as the ``segment-anything`` package stores it: recognised, measured and renamed from the weights alone.

References
----------
The names and shapes are those of ``segment_anything.modeling`` (facebookresearch/segment-anything), which MedSAM keeps
and SAM-Med2D (OpenGVLab/SAM-Med2D) extends by adapters.
"""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medreasoner.errors import BundleError
from medreasoner_export.checkpoint import Checkpoint, Weights
from medreasoner_export.torch_file import read_torch_file

__all__ = ["open_sam"]

ENCODER, DECODER, PROMPTS = "image_encoder.", "mask_decoder.", "prompt_encoder."
PROBES = (ENCODER + "patch_embed.proj.weight", DECODER + "iou_token.weight", PROMPTS + "no_mask_embed.weight")
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


def open_sam(path: str | Path) -> Weights:
    """Weights of a SAM under their names in transformers, whatever form they are stored in.

    Parameters
    ----------
    path
        A folder as transformers writes it, or a ``.pt`` or ``.pth`` file of ``segment-anything``.

    Raises
    ------
    BundleError
        If it holds something else; the message names the file.
    """
    path = Path(path)
    if path.is_dir():
        return Checkpoint(path)
    entries = read_torch_file(path)
    missing = [name for name in PROBES if name not in entries]
    if missing:
        raise BundleError(
            f"{path}: the architecture is not recognised: a SAM of segment-anything has {missing[0]}, "
            f"this file {next(iter(entries), 'nothing')}"
        )
    config = _config(path, {name: entry.shape for name, entry in entries.items()})
    last = {name: str(depth - 1) for name, depth in _heads(entries).items()}
    return Weights(path, config, {_renamed(name, last): entry for name, entry in entries.items()}, [path])


def _heads(names: Mapping[str, object]) -> dict[str, int]:
    """Number of layers of each small head of the decoder, by the beginning of their names."""
    pattern = re.compile(r"(mask_decoder\..+)\.layers\.\d+\.weight$")
    return Counter(match[1] for name in names if (match := pattern.match(name)))


def _renamed(name: str, last: Mapping[str, str]) -> str:
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


def _config(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What ``config.json`` of the same model says in transformers."""

    def shape(name: str, rank: int) -> tuple[int, ...]:
        found = shapes.get(name)
        if found is None or len(found) != rank:
            raise BundleError(f"{path}: {name}: expected {rank} dimensions, got {found}")
        return found

    def count(start: str) -> int:
        return len({name[len(start) :].partition(".")[0] for name in shapes if name.startswith(start)})

    hidden, _, patch, _ = shape(ENCODER + "patch_embed.proj.weight", 4)
    grid = shape(ENCODER + "pos_embed", 4)[1]
    layers = count(ENCODER + "blocks.")
    block = ENCODER + "blocks.{}."
    offsets = [shape(block.format(index) + "attn.rel_pos_h", 2) for index in range(layers)]
    sides = [(rows + 1) // 2 for rows, _ in offsets]
    windows = sorted({side for side in sides if side != grid})
    head = offsets[0][1]
    if len(windows) > 1 or head == 0 or hidden % head:
        raise BundleError(f"{path}: attention windows of {windows} patches and heads of {head} do not fit one SAM")
    channels = shape(ENCODER + "neck.0.weight", 4)[0]
    first = DECODER + "transformer.layers.0."
    iou = DECODER + "iou_prediction_head.layers."
    adapter = shapes.get(block.format(0) + "Adapter.channel.0.weight", ())
    if adapter and grid % 2:
        raise BundleError(f"{path}: adapters want an even number of patches along a side, got {grid}")
    attended = shape(first + "cross_attn_token_to_image.q_proj.weight", 2)[0]
    if attended == 0:
        raise BundleError(f"{path}: attention of no channels")
    return {
        "model_type": "sam",
        "vision_config": {
            "image_size": grid * patch,
            "patch_size": patch,
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // head,
            "mlp_dim": shape(block.format(0) + "mlp.lin1.weight", 2)[0],
            "output_channels": channels,
            "num_pos_feats": channels // 2,
            "window_size": windows[0] if windows else grid,
            "global_attn_indexes": [index for index, side in enumerate(sides) if side == grid],
            "qkv_bias": block.format(0) + "attn.qkv.bias" in shapes,
            **({"adapter_dim": adapter[0]} if adapter else {}),  # of SAM-Med2D; transformers knows none
        },
        "prompt_encoder_config": {
            "hidden_size": channels,
            "image_size": grid * patch,
            "patch_size": patch,
            "mask_input_channels": shape(PROMPTS + "mask_downscaling.3.weight", 4)[0],
        },
        "mask_decoder_config": {
            "hidden_size": channels,
            "mlp_dim": shape(first + "mlp.lin1.weight", 2)[0],
            "num_hidden_layers": count(DECODER + "transformer.layers."),
            "num_attention_heads": DECODER_HEADS,
            "attention_downsample_rate": channels // attended,
            "num_multimask_outputs": shape(DECODER + "mask_tokens.weight", 2)[0] - 1,
            "iou_head_depth": count(iou),
            "iou_head_hidden_dim": shape(iou + "0.weight", 2)[0],
            "layer_norm_eps": DECODER_EPSILON,
        },
    }
