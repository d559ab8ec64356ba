"""A segmenter's checkpoint as torch runs it: transformers' ``SamModel`` or ``Sam2Model``, and beside it what those
classes do not know.

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
from medreasoner_export.checkpoint import Weights
from medreasoner_export.report import load_reference
from medreasoner_export.sam_family import SAM2_VIDEO, TWICE, is_sam2, open_sam
from medreasoner_export.sam_image import NECK_EPSILON
from medreasoner_export.tiny_vit import is_tiny_vit, merge_stride, offset_rows

__all__ = ["by_output", "load_sam"]

Embed: TypeAlias = Callable[[Tensor], Any]
"""Makes of pixels (B, 3, S, S) what the model takes as ``image_embeddings``."""

Named: TypeAlias = Mapping[str, Tensor]


def load_sam(path: Path, *, image_size: int) -> tuple[Any, Embed]:
    """The model in float32, and what makes of pixels what it takes as ``image_embeddings``.

    Parameters
    ----------
    path
        The checkpoint.
    image_size
        Of a SAM 2, whose weights fit any; a SAM knows its own.

    Raises
    ------
    BundleError
        If it cannot be loaded; the message names the file.
    """
    weights = open_sam(path)
    if is_sam2(weights):
        model = _sam2(weights, image_size)
        return model, model.get_image_embeddings
    if path.is_dir():
        sam = load_reference(transformers.SamModel, path, dtype=torch.float32).eval()
        return sam, sam.get_image_embeddings
    return _original_sam(path, weights)


def by_output(embeddings: Any) -> dict[str, Tensor]:
    """What an encoder's graph returns, by the names there, of a model's ``image_embeddings``."""
    if isinstance(embeddings, Tensor):
        return {"image_embedding": embeddings}
    finest, finer, embedding = embeddings
    batch, _, grid, _ = embedding.shape
    # A place's quarters lie beside each other, and in each of them its own.
    finer = finer.reshape(batch, -1, grid, 2, grid, 2).permute(0, 2, 4, 3, 5, 1)
    finest = finest.reshape(batch, -1, grid, 2, 2, grid, 2, 2).permute(0, 2, 5, 3, 6, 4, 7, 1)
    blocks = {"high_res_s1": finer, "high_res_s0": finest}
    flat = {name: part.reshape(batch, -1, part.shape[-1]) for name, part in blocks.items()}
    return {"image_embedding": embedding, **flat}


def _sam2(weights: Weights, image_size: int) -> Any:
    parts = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
    sections = {name: dict(weights.config.get(name, {})) for name in parts}
    for name in parts[1:]:
        sections[name].pop("model_type", None)  # a video model's sections are those of an image model
    sections["prompt_encoder_config"]["image_size"] = image_size
    sections["vision_config"]["backbone_feature_sizes"] = [[image_size // stride] * 2 for stride in (4, 8, 16)]
    config = transformers.Sam2Config.from_dict(sections)
    if weights.path.is_dir():
        return load_reference(transformers.Sam2Model, weights.path, config=config, dtype=torch.float32).eval()
    model = transformers.Sam2Model(config)
    shapes = {name: shape for name, shape in weights.shapes.items() if not any(part in name for part in SAM2_VIDEO)}
    state = {name: torch.from_numpy(weights.tensor(name, shape).astype("float32")) for name, shape in shapes.items()}
    _load(model, state, weights.path)
    return model.eval()


def _load(model: Any, state: dict[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as err:
        raise BundleError(f"{path}: it is no whole {type(model).__name__} ({one_line(err)})") from err


def _original_sam(path: Path, weights: Weights) -> tuple[Any, Embed]:
    shapes = {name: shape for name, shape in weights.shapes.items() if not name.endswith("num_batches_tracked")}
    state = {name: torch.from_numpy(weights.tensor(name, shape).astype("float32")) for name, shape in shapes.items()}
    sam = transformers.SamModel(transformers.SamConfig.from_dict(weights.config))
    if is_tiny_vit(weights):
        start = "vision_encoder."
        own = {name.removeprefix(start): state.pop(name) for name in list(state) if name.startswith(start)}
        state |= {name: value for name, value in sam.state_dict().items() if name.startswith(start)}  # stays unused
    adapters = {name: state.pop(name) for name in list(state) if ".Adapter." in name}
    state[TWICE] = state["shared_image_embedding.positional_embedding"]
    _load(sam, state, path)
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
