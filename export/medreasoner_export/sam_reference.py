"""A segmenter's checkpoint as torch runs it: transformers' ``SamModel``, and beside it what that class does not know.

Imported by the parity check alone: it needs torch and transformers.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from torch import Tensor
from torch.nn import functional as nn

from medreasoner._text import one_line
from medreasoner.errors import BundleError
from medreasoner_export.report import load_reference
from medreasoner_export.sam_family import TWICE, open_sam
from medreasoner_export.sam_image import NECK_EPSILON
from medreasoner_export.tiny_vit import is_tiny_vit, merge_stride, offset_rows

__all__ = ["load_sam"]

Embed: TypeAlias = Callable[[Tensor], Tensor]
Named: TypeAlias = Mapping[str, Tensor]


def load_sam(path: Path) -> tuple[Any, Embed]:
    """The model in float32, and what makes image embeddings (B, C, grid, grid) of pixels (B, 3, S, S).

    Raises
    ------
    BundleError
        If it cannot be loaded; the message names the file.
    """
    if path.is_dir():
        sam = load_reference(transformers.SamModel, path, dtype=torch.float32).eval()
        return sam, sam.get_image_embeddings
    weights = open_sam(path)
    shapes = {name: shape for name, shape in weights.shapes.items() if not name.endswith("num_batches_tracked")}
    state = {name: torch.from_numpy(weights.tensor(name, shape).astype("float32")) for name, shape in shapes.items()}
    sam = transformers.SamModel(transformers.SamConfig.from_dict(weights.config))
    if is_tiny_vit(weights):
        start = "vision_encoder."
        own = {name.removeprefix(start): state.pop(name) for name in list(state) if name.startswith(start)}
        state |= {name: value for name, value in sam.state_dict().items() if name.startswith(start)}  # stays unused
    adapters = {name: state.pop(name) for name in list(state) if ".Adapter." in name}
    state[TWICE] = state["shared_image_embedding.positional_embedding"]
    try:
        sam.load_state_dict(state)
    except RuntimeError as err:
        raise BundleError(f"{path}: it is no whole SAM ({one_line(err)})") from err
    for index, layer in enumerate(sam.vision_encoder.layers if adapters else ()):
        start = f"vision_encoder.layers.{index}.Adapter."
        branch = {name.removeprefix(start): value for name, value in adapters.items() if name.startswith(start)}
        layer.mlp.register_forward_hook(partial(_beside_mlp, branch))
    sam.eval()
    return sam, partial(_tiny_vit, own) if is_tiny_vit(weights) else sam.get_image_embeddings


def _beside_mlp(weights: Named, _mlp: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Output (B, H, W, C) of a layer's MLP and of SAM-Med2D's adapter beside it."""
    (x,) = inputs
    planes = x.permute(0, 3, 1, 2)
    gate = nn.linear(nn.relu(nn.linear(x.mean((1, 2)), weights["channel.0.weight"])), weights["channel.2.weight"])
    y = planes * gate.sigmoid()[:, :, None, None]
    y = nn.relu(nn.conv2d(y, weights["spatial.0.weight"], stride=2, padding=1))
    y = nn.relu(nn.conv_transpose2d(y, weights["spatial.2.weight"], stride=2, padding=1))
    y = (planes + y).permute(0, 2, 3, 1)
    return output + nn.layer_norm(y, y.shape[-1:], weights["norm.weight"], weights["norm.bias"])


def _tiny_vit(weights: Named, x: Tensor) -> Tensor:
    """LiteMedSAM's image embedding, step by step as its code has it, batch norms and all."""

    def names(start: str) -> list[str]:
        found = {name[len(start) :].partition(".")[0] for name in weights if name.startswith(start)}
        return [f"{start}{index}." for index in range(len(found))]

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        kernel = weights[name + ".c.weight"]
        groups = x.shape[1] // kernel.shape[1]
        y = nn.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2, groups=groups)
        mean, variance, scale, shift = (
            weights[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return nn.batch_norm(y, mean, variance, scale, shift)

    def norm(x: Tensor, name: str, epsilon: float = 1e-5) -> Tensor:
        return nn.layer_norm(x, x.shape[-1:], weights[name + ".weight"], weights[name + ".bias"], epsilon)

    def linear(x: Tensor, name: str) -> Tensor:
        return nn.linear(x, weights[name + ".weight"], weights[name + ".bias"])

    def attend(windows: Tensor, name: str) -> Tensor:
        table = weights[name + "attention_biases"]
        rows = torch.from_numpy(offset_rows(math.isqrt(table.shape[1])))
        qkv = linear(norm(windows, name + "norm"), name + "qkv")
        q, k, v = qkv.reshape(*qkv.shape[:2], len(table), 3, -1).permute(3, 0, 2, 1, 4)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + table[:, rows]
        return linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), name + "proj")

    def block(x: Tensor, name: str) -> Tensor:
        batch, dim, height, width = x.shape
        window = math.isqrt(weights[name + "attn.attention_biases"].shape[1])
        tokens = x.permute(0, 2, 3, 1)
        padded = nn.pad(tokens, (0, 0, 0, -width % window, 0, -height % window))
        down, across = padded.shape[1] // window, padded.shape[2] // window
        cut = padded.reshape(batch, down, window, across, window, dim).transpose(2, 3)
        seen = attend(cut.reshape(-1, window * window, dim), name + "attn.")
        joined = seen.reshape(batch, down, across, window, window, dim).transpose(2, 3).reshape(padded.shape)
        tokens = tokens + joined[:, :height, :width]
        tokens = conv(tokens.permute(0, 3, 1, 2), name + "local_conv").permute(0, 2, 3, 1)
        hidden = nn.gelu(linear(norm(tokens, name + "mlp.norm"), name + "mlp.fc1"))
        return (tokens + linear(hidden, name + "mlp.fc2")).permute(0, 3, 1, 2)

    x = conv(nn.gelu(conv(x, "patch_embed.seq.0")), "patch_embed.seq.2")
    for stage, layer in enumerate(names("layers.")):
        for each in names(layer + "blocks."):
            if stage:
                x = block(x, each)
            else:
                y = nn.gelu(conv(nn.gelu(conv(x, each + "conv1")), each + "conv2"))
                x = nn.gelu(conv(y, each + "conv3") + x)
        merge = layer + "downsample.conv"
        if f"{merge}1.c.weight" in weights:
            stride = merge_stride(weights[f"{merge}1.c.weight"].shape[0])
            x = conv(nn.gelu(conv(nn.gelu(conv(x, merge + "1")), merge + "2", stride)), merge + "3")
    x = nn.conv2d(x, weights["neck.conv1.weight"]).permute(0, 2, 3, 1)
    x = norm(x, "neck.layer_norm1", NECK_EPSILON).permute(0, 3, 1, 2)
    x = nn.conv2d(x, weights["neck.conv2.weight"], padding=1).permute(0, 2, 3, 1)
    return norm(x, "neck.layer_norm2", NECK_EPSILON).permute(0, 3, 1, 2)
