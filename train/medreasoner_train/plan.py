"""What a GRPO run of a Qwen2.5-VL needs of a GPU's memory, worked out before anything is loaded.

The model is built on torch's meta device, so its parameters are counted, not estimated. With P parameters, T of them
trained, and S = the number of processes under FSDP, else 1, a process holds, in bytes:

=============  ====================================================================================================
weights        4 T / S (float32, also beside bfloat16 arithmetic) and 2 (P - T) / S of those that stay
gradients      4 T / S, and with DDP the buckets in which they are exchanged, another 4 T
adam           8 T / S: two moments
reference      2 P / S in bfloat16; 0 with LoRA (the adapters are switched off) or without the KL term
gathered       FSDP: embedding and language head, two decoder layers (one at work, one under way), and the gradients of
               the head and one layer, which are summed in float32; bfloat16 without FSDP: autocast's copies, 2 P
activations    of n tokens and p patches. One decoder layer keeps n (8 m + 30 h + 4 k), one block of the tower
               p (8 m' + 33 h') in bfloat16, or n (16 m + 32 h + 8 k) and p (16 m' + 52 h') in float32 (h hidden,
               m inner size, k that of all keys). With gradient checkpointing only one layer does so at a time, beside
               4 h and 4 h' for each layer's input. And 4 m e for what the layer's gradients need, e bytes an element
logits         18 bytes for each of :data:`~medreasoner_train.hub_policy.POSITIONS` positions and each vocabulary entry
rollouts       vLLM on the same GPU: 2 P / (tensor parallel) and 4 l k bytes of cache a token (l layers), all at once
=============  ====================================================================================================

Weights, gradients and moments are exact. The activations' factors were found by counting what autograd keeps; torch's
own count of peaks is within a factor of 1.3 of them (``tests/train/test_plan.py``). Not in it: CUDA's context, NCCL's
buffers and what the allocator cannot use, about 3 GB.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from medreasoner._text import one_line
from medreasoner.errors import BundleError
from medreasoner_train.distributed import ScaleOptions
from medreasoner_train.hub_policy import POSITIONS, freeze
from medreasoner_train.lora import LoraOptions, add_adapter

__all__ = ["QWEN2_5_VL_7B", "Plan", "Workload", "meta_model", "plan"]

QWEN2_5_VL_7B: Mapping[str, Any] = {
    "text_config": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": False,
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
    "tie_word_embeddings": False,
}
"""Sizes of Qwen2.5-VL-7B, which MedReasoner-7B was trained from: 8,292,166,656 parameters."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a process has in hand at a time.

    Parameters
    ----------
    answers
        Whose gradient is worked out together, each with its prompt.
    prompt_tokens, response_tokens
        Longest prompt, its image included, and longest answer.
    images, image_tokens
        Different images among the prompts, and the tokens of one (four patches each).
    rollouts, tensor_parallel
        Answers that vLLM writes at a time on this GPU (0: it runs elsewhere), and the GPUs that share one engine.
    """

    answers: int = 16
    prompt_tokens: int = 2048
    response_tokens: int = 2048
    images: int = 1
    image_tokens: int = 900
    rollouts: int = 0
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        for name in ("answers", "prompt_tokens", "response_tokens", "images", "image_tokens", "tensor_parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1")
        if self.image_tokens > self.prompt_tokens:
            raise ValueError(f"image_tokens: {self.image_tokens} do not fit a prompt of {self.prompt_tokens}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The count of parameters and the bytes that each of a process's parts takes."""

    parameters: int
    trained: int
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes of all parts together."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        rows = [f"{self.parameters:,} parameters, {self.trained:,} of them trained; memory of one GPU:"]
        rows += [f"  {name:<12}{size / 1e9:8.1f} GB" for name, size in self.parts.items()]
        return "\n".join([*rows, f"  {'together':<12}{self.total / 1e9:8.1f} GB"])


def meta_model(config: Mapping[str, Any] | Path) -> Any:
    """A Qwen2.5-VL without memory for its weights.

    Parameters
    ----------
    config
        Sizes as ``config.json`` has them, or the folder of a checkpoint.

    Raises
    ------
    BundleError
        If transformers can make no model of it.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    if isinstance(config, Path) and not (config / "config.json").is_file():
        raise BundleError(f"{config} holds no config.json; give the folder of a Qwen2.5-VL checkpoint")
    try:
        if isinstance(config, Path):
            sizes = Qwen2_5_VLConfig.from_pretrained(config, local_files_only=True)
        else:
            sizes = Qwen2_5_VLConfig(**config)
        with torch.device("meta"):
            return Qwen2_5_VLForConditionalGeneration(sizes)
    except Exception as err:  # transformers raises many kinds for one cause
        where = config if isinstance(config, Path) else "sizes"
        raise BundleError(f"{where}: transformers cannot make a Qwen2.5-VL of it ({one_line(err)})") from err


def plan(
    config: Mapping[str, Any] | Path,
    *,
    scale: ScaleOptions,
    work: Workload,
    precision: Literal["fp32", "bf16"] = "bf16",
    gradient_checkpointing: bool = True,
    frozen_vision: bool = False,
    frozen_embeddings: bool = False,
    lora: LoraOptions | None = None,
    kl: bool = True,
) -> Plan:
    """The memory that each process needs; the arithmetic is at the head of this module.

    Parameters
    ----------
    config
        See :func:`meta_model`.
    scale, work
        The processes, and what each has in hand.
    precision, gradient_checkpointing, frozen_vision, frozen_embeddings, lora
        How the policy is trained.
    kl
        Whether there is a reference.
    """
    model = meta_model(config)
    freeze(model, vision=frozen_vision, embeddings=frozen_embeddings)
    sizes = model.config
    if lora is not None:
        model = add_adapter(model, lora)
    every = sum(each.numel() for each in model.parameters())
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    split = scale.processes if scale.fsdp else 1
    element = 2 if precision == "bf16" else 4
    text = sizes.text_config
    cached = 4 * text.num_hidden_layers * _key_size(text)  # keys and values in bfloat16
    tokens = work.prompt_tokens + work.response_tokens
    rollouts = 2 * every // work.tensor_parallel + cached * work.rollouts * tokens // work.tensor_parallel
    parts = {
        "weights": (4 * trained + 2 * (every - trained)) // split,
        "gradients": 4 * trained // split + (4 * trained if scale.processes > 1 and not scale.fsdp else 0),
        "adam": 8 * trained // split,
        "reference": 2 * every // split if kl and lora is None else 0,
        "gathered": _gathered(model, element) if scale.fsdp else (2 * every if precision == "bf16" else 0),
        "activations": _activations(
            sizes, work, element, checkpointing=gradient_checkpointing, vision=not frozen_vision
        ),
        "logits": 18 * POSITIONS * text.vocab_size,
        "rollouts": rollouts if work.rollouts else 0,
    }
    return Plan(parameters=every, trained=trained, parts=parts)


def _key_size(text: Any) -> int:
    return int(text.hidden_size // text.num_attention_heads * text.num_key_value_heads)


def _gathered(model: Any, element: int) -> int:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    language = base.model.language_model

    def size(module: Any) -> int:
        return sum(each.numel() for each in module.parameters())

    layer, head = size(language.layers[0]), size(base.lm_head)
    tied = base.lm_head.weight is language.embed_tokens.weight
    embedding = 0 if tied else size(language.embed_tokens)
    gradients = element if element == 4 else element + 4
    return element * (embedding + head + 2 * layer) + gradients * (head + layer)


def _activations(sizes: Any, work: Workload, element: int, *, checkpointing: bool, vision: bool) -> int:
    text, eye = sizes.text_config, sizes.vision_config
    tokens = work.answers * (work.prompt_tokens + work.response_tokens)
    patches = work.images * work.image_tokens * eye.spatial_merge_size**2
    h, m, k = text.hidden_size, text.intermediate_size, _key_size(text)
    if element == 2:
        layer = tokens * (8 * m + 30 * h + 4 * k)
        block = patches * (8 * eye.intermediate_size + 33 * eye.hidden_size)
    else:
        layer = tokens * (16 * m + 32 * h + 8 * k)
        block = patches * (16 * eye.intermediate_size + 52 * eye.hidden_size)
    block = block if vision else 0
    gradients = 4 * element * max(tokens * m, patches * eye.intermediate_size if vision else 0)
    if not checkpointing:
        return int(text.num_hidden_layers * layer + eye.depth * block + gradients)
    inputs = 4 * tokens * h * text.num_hidden_layers + (4 * patches * eye.hidden_size * eye.depth if vision else 0)
    return int(inputs + max(layer, block) + gradients)
