"""LoRA adapters in the layout of peft, merged into a checkpoint's weights when these are read.

An adapter replaces nothing on disk: a tensor that it changes is read, its product of two narrow matrices is added in
float32, and the sum is what the export sees.

References
----------
E. Hu et al., "LoRA" (arXiv 2106.09685), section 4.1; peft's ``adapter_config.json`` and ``adapter_model.safetensors``.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medreasoner._text import printable
from medreasoner.errors import BundleError
from medreasoner_export.checkpoint import DTYPES, Entry, Weights, read_header, read_json
from medreasoner_export.qwen_decoder import TEXT_PREFIXES
from medreasoner_export.qwen_vision import PREFIXES as VISION_PREFIXES

__all__ = ["with_adapter"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What an adapter may name a part of the model, and how the parts may be called in a checkpoint.
PARTS = ((*TEXT_PREFIXES, "language_model.model."), VISION_PREFIXES)
UNSUPPORTED = ("use_dora", "megatron_config", "layer_replication", "trainable_token_indices", "alora_invocation_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scales:
    """The factor of each adapted matrix."""

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rank_stabilised: bool

    def of(self, module: str) -> float:
        rank, alpha = _matching(self.ranks, module, self.rank), _matching(self.alphas, module, self.alpha)
        return float(alpha) / (math.sqrt(rank) if self.rank_stabilised else rank)


def with_adapter(weights: Weights, folder: str | Path) -> Weights:
    """The weights with a LoRA adapter merged in.

    Parameters
    ----------
    weights
        Of the model that the adapter was trained on.
    folder
        Of the adapter: ``adapter_config.json`` and ``adapter_model.safetensors``, as peft's ``save_pretrained`` writes
        them.

    Raises
    ------
    BundleError
        If a file is missing or malformed, the adapter is of another kind (DoRA, trained embeddings), or it changes a
        matrix that the checkpoint does not have in that shape; the message names file and tensor.
    """
    folder = Path(folder)
    config, file = read_json(folder / CONFIG), folder / WEIGHTS
    if not file.is_file():
        raise BundleError(f"{folder} holds no {WEIGHTS}; save the adapter with peft's save_pretrained")
    scales = _scales(folder / CONFIG, config)
    tensors = read_header(file)
    entries = dict(weights.entries)
    left = set(tensors)
    for name in sorted(tensors):
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removesuffix(".lora_A.weight")
        other = f"{module}.lora_B.weight"
        if other not in tensors:
            raise BundleError(f"{file}: {printable(name)} has no {printable(other)} beside it")
        stored = _stored(weights, module.removeprefix("base_model.model."), file)
        own = module.removeprefix("base_model.model.")  # as peft names it in its patterns
        scale = scales.of(own)
        rank = _matching(scales.ranks, own, scales.rank)
        if tensors[name].shape[:1] != (rank,):
            raise BundleError(
                f"{file}: {printable(name)[:120]} has shape {tensors[name].shape}, and {CONFIG} says rank {rank}; "
                "they are not of one adapter"
            )
        entries[stored] = _merged(entries[stored], tensors[name], tensors[other], stored, scale)
        left -= {name, other}
    if not tensors:
        raise BundleError(f"{file} holds no tensor; save the adapter with peft's save_pretrained")
    if left:
        raise BundleError(
            f"{file}: {len(left)} tensors are no pairs of lora_A and lora_B, first {printable(min(left))[:120]}; "
            "only plain LoRA on linear layers is merged here: merge the adapter with peft's merge_and_unload"
        )
    return Weights(weights.path, weights.config, entries, [*weights.files, file, folder / CONFIG])


def _scales(path: Path, config: Mapping[str, Any]) -> _Scales:
    if config.get("peft_type") != "LORA":
        raise BundleError(f"{path}: peft_type: expected LORA, got {config.get('peft_type')!r:.60}")
    for key in UNSUPPORTED:
        if config.get(key):
            raise BundleError(f"{path}: {key} is not supported: merge the adapter with peft's merge_and_unload")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(("pissa", "olora", "corda", "loftq")):
        raise BundleError(
            f"{path}: init_lora_weights {start!r:.40} changes the base model: merge the adapter with merge_and_unload"
        )
    if config.get("bias", "none") != "none":
        raise BundleError(f"{path}: bias: only none is supported, got {config['bias']!r:.60}")
    if config.get("fan_in_fan_out"):
        raise BundleError(f"{path}: fan_in_fan_out is not supported: no layer of this model is stored so")
    try:
        scales = _Scales(
            rank=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            ranks={str(key): int(value) for key, value in (config.get("rank_pattern") or {}).items()},
            alphas={str(key): float(value) for key, value in (config.get("alpha_pattern") or {}).items()},
            rank_stabilised=bool(config.get("use_rslora", False)),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise BundleError(f"{path}: r, lora_alpha and their patterns must be numbers ({err!r:.120})") from err
    if min([scales.rank, *scales.ranks.values()]) < 1:
        raise BundleError(f"{path}: a rank must be at least 1")
    return scales


def _matching(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the pattern that a module's name ends with, as peft has it."""
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error:
            continue
    return default


def _stored(weights: Weights, module: str, file: Path) -> str:
    """The name in the checkpoint of the matrix of a module, whichever of the layouts either has."""
    for candidates in PARTS:
        for own in candidates:
            if module.startswith(own):
                names = [f"{prefix}{module.removeprefix(own)}.weight" for prefix in candidates]
                found = next((name for name in names if name in weights), None)
                if found is not None:
                    return found
    if f"{module}.weight" in weights:
        return f"{module}.weight"
    raise BundleError(f"{file}: {printable(module)[:120]} is no matrix of {weights.path}")


def _merged(base: Entry, down: Entry, up: Entry, name: str, scale: float) -> Entry:
    """The matrix (out, in) plus ``scale * up @ down``; down is (rank, in), up (out, rank)."""
    for each in (down, up):
        if each.dtype not in DTYPES:
            raise BundleError(f"{each.file}: expected weights of one of {sorted(DTYPES)}, got {each.dtype}")
    shapes = len(base.shape) == len(down.shape) == len(up.shape) == 2
    if not shapes or (up.shape[0], down.shape[1]) != base.shape or up.shape[1] != down.shape[0]:
        raise BundleError(f"{down.file}: {up.shape} times {down.shape} does not fit {name} {base.shape}")
    return Entry(file=down.file, dtype="F32", shape=base.shape, read=partial(_sum, base, down, up, scale))


def _sum(base: Entry, down: Entry, up: Entry, scale: float) -> npt.NDArray[np.float32]:
    first, second = (each.read().astype(np.float32) for each in (up, down))
    total: npt.NDArray[np.float32] = base.read().astype(np.float32) + np.float32(scale) * (first @ second)
    return total
