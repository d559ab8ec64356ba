"""A Qwen2.5-VL or Qwen2-VL as transformers runs it, in float32, with the weights of one layer at a time in memory.

The model is made without weights. Before a module with weights of its own runs, they are read from the mapped files of
the checkpoint and brought to float32; behind it they are let go. A model of seven billion parameters thus needs the
memory of its largest matrix, and a run reads the whole checkpoint once.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from medreasoner._extras import require
from medreasoner._text import one_line
from medreasoner.errors import BundleError
from medreasoner.reasoner.vision import VisionGrid
from medreasoner_export.checkpoint import Checkpoint, Weights
from medreasoner_export.lora import with_adapter
from medreasoner_export.qwen_decoder import TEXT_PREFIXES
from medreasoner_export.qwen_vision import PREFIXES as VISION_PREFIXES

__all__ = ["TEXT", "VISION", "Change", "prompt_inputs", "streamed_qwen", "two_frames"]

Array: TypeAlias = npt.NDArray[Any]

Change: TypeAlias = Callable[[str, npt.NDArray[np.float32]], npt.NDArray[np.float32]]
"""What to make of a weight, by its name in transformers: such as its value in four bits."""

TEXT, VISION, HEAD = "model.language_model.", "model.visual.", "lm_head.weight"
EMBEDDING = TEXT + "embed_tokens"
HEAD_ROWS = 8192  # of the language head at a time


def streamed_qwen(folder: str | Path, *, adapter: Path | None = None, change: Change | None = None) -> Any:
    """The ``Qwen2_5_VLForConditionalGeneration``, or Qwen2-VL's, of a checkpoint's folder; not for gradients.

    Parameters
    ----------
    folder
        With ``config.json`` and safetensors weights of any floating type.
    adapter
        Folder of a LoRA adapter that is merged in.
    change
        Applied to each weight in float32 before it is used.

    Raises
    ------
    BundleError
        If the folder holds no such checkpoint, or a tensor is missing or misshapen; the message names it.
    """
    feature = "The parity check"
    transformers = require("transformers", extra="export", feature=feature)
    accelerate = require("accelerate", extra="export", feature=feature)
    checkpoint: Weights = Checkpoint(folder)
    if adapter is not None:
        checkpoint = with_adapter(checkpoint, adapter)
    try:
        kind = {"qwen2_vl": "Qwen2VL"}.get(str(checkpoint.config.get("model_type")), "Qwen2_5_VL")
        config = getattr(transformers, f"{kind}Config").from_pretrained(folder, local_files_only=True)
        with accelerate.init_empty_weights(include_buffers=False):
            model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    except Exception as err:  # transformers raises many kinds for a configuration that is not its own
        raise BundleError(f"{folder}: transformers cannot make a model of it ({one_line(err)})") from err
    names = _Names(checkpoint)
    for path, module in model.named_modules():
        own = {name: (names.stored(f"{path}.{name}"), tuple(p.shape)) for name, p in module.named_parameters("", False)}
        if path in (EMBEDDING, HEAD.removesuffix(".weight")):
            stored, shape = own["weight"]
            by_rows = _looked_up if path == EMBEDDING else _projected
            module.forward = partial(
                by_rows, checkpoint, stored, shape, partial(change or _unchanged, f"{path}.weight")
            )
        elif own:
            module.register_forward_pre_hook(partial(_load, checkpoint, path, own, change))
            module.register_forward_hook(partial(_drop, dict(module.named_parameters("", False))))
    return model.eval()


def prompt_inputs(model: Any, ids: Sequence[int], image_token: int, patches: Array, grid: VisionGrid) -> dict[str, Any]:
    """What `model` is given to read a prompt with one image: ``input_ids`` and what goes with them.

    Parameters
    ----------
    model
        As :func:`streamed_qwen` makes it.
    ids, image_token
        The prompt, and the token that stands for one of the image's in it.
    patches
        (n_patches, 3 * patch_size**2) float32 as the runtime makes them.
    grid
        The image's tokens.
    """
    torch = require("torch", extra="export", feature="The parity check")
    merge = model.config.vision_config.spatial_merge_size
    return {
        "input_ids": torch.tensor([list(ids)]),
        "pixel_values": two_frames(model, patches),
        "image_grid_thw": torch.tensor([[1, grid.rows * merge, grid.columns * merge]]),
        "mm_token_type_ids": torch.tensor([[int(token == image_token) for token in ids]]),
    }


def two_frames(model: Any, patches: Array) -> Any:
    """Patches (..., 3 * patch**2) as (n, 3 * 2 * patch**2) for transformers: an image is its own second frame."""
    torch = require("torch", extra="export", feature="The parity check")
    vision = model.config.vision_config
    planes = np.repeat(patches.reshape(-1, 3, 1, vision.patch_size**2), vision.temporal_patch_size, axis=2)
    return torch.from_numpy(planes.reshape(len(planes), -1))


class _Names:
    """Names in a checkpoint's files, as published or as transformers 5 writes them."""

    def __init__(self, checkpoint: Weights) -> None:
        self._text = checkpoint.prefix(TEXT_PREFIXES, "embed_tokens.weight")
        self._vision = checkpoint.prefix(VISION_PREFIXES, "patch_embed.proj.weight")
        self._tied = HEAD not in checkpoint

    def stored(self, name: str) -> str:
        """The name in the files of a parameter that transformers calls `name`."""
        if name == HEAD and self._tied:
            name = EMBEDDING + ".weight"
        for own, prefix in ((TEXT, self._text), (VISION, self._vision)):
            if name.startswith(own):
                return prefix + name.removeprefix(own)
        return name


def _unchanged(_name: str, weight: Array) -> Array:
    return weight


def _looked_up(
    checkpoint: Weights, stored: str, shape: tuple[int, ...], change: Callable[[Array], Array], ids: Any
) -> Any:
    """An embedding that takes only the rows in use into memory: one of a large vocabulary is 2 GiB in float32."""
    torch = require("torch", extra="export", feature="The parity check")
    rows = checkpoint.tensor(stored, shape)[ids.reshape(-1).numpy()].astype(np.float32)
    return torch.from_numpy(change(rows)).reshape(*ids.shape, shape[1])


def _projected(
    checkpoint: Weights, stored: str, shape: tuple[int, ...], change: Callable[[Array], Array], states: Any
) -> Any:
    """A language head in parts, for the same reason."""
    torch = require("torch", extra="export", feature="The parity check")
    matrix = checkpoint.tensor(stored, shape)
    parts = (change(matrix[start : start + HEAD_ROWS].astype(np.float32)) for start in range(0, shape[0], HEAD_ROWS))
    return torch.cat([states @ torch.from_numpy(np.ascontiguousarray(part)).T for part in parts], dim=-1)


def _load(
    checkpoint: Weights, path: str, own: dict[str, tuple[str, tuple[int, ...]]], change: Change | None,
    module: Any, _inputs: Any,
) -> None:  # fmt: skip
    torch = require("torch", extra="export", feature="The parity check")
    for name, (stored, shape) in own.items():
        array = checkpoint.tensor(stored, shape).astype(np.float32)
        if change is not None:
            array = change(f"{path}.{name}", array)
        setattr(module, name, torch.nn.Parameter(torch.from_numpy(np.ascontiguousarray(array)), requires_grad=False))


def _drop(empty: dict[str, Any], module: Any, _inputs: Any, _output: Any) -> None:
    for name, parameter in empty.items():
        setattr(module, name, parameter)
