"""Low-rank adapters through peft: what is trained is small, and the reference is the same model without them.

References
----------
E. Hu et al., "LoRA" (arXiv 2106.09685).
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medreasoner._extras import require
from medreasoner_train.hub_policy import HubPolicy
from medreasoner_train.rollout import Completion, Prompt

__all__ = ["AdapterReference", "LoraOptions", "add_adapter", "merged_weights", "save_adapter"]

FEATURE = "Training of LoRA adapters"
DECODER = r"language_model\.layers\.\d+\."
VISION = r"visual\.blocks\.\d+\."


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoraOptions:
    """Which matrices are adapted, and how much.

    Parameters
    ----------
    rank, alpha
        A matrix W becomes W + alpha / rank * B A, with A (rank, in) and B (out, rank).
    targets
        Last part of the names of the matrices.
    vision
        Whether those of the vision tower are adapted too, by the names that it has for them.
    dropout
        Share of A's input that is dropped in training. 0 keeps the ratio of new to old probability exact.
    """

    rank: int = 64
    alpha: float = 128.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    vision: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank: at least 1, not {self.rank}")
        if self.alpha <= 0:
            raise ValueError(f"alpha: more than 0, not {self.alpha:g}")
        if not self.targets:
            raise ValueError("targets: at least one matrix, such as q_proj")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: a share, 0 or more and less than 1, not {self.dropout:g}")

    def pattern(self) -> str:
        """The whole names of the modules, as a regular expression."""
        own = "|".join(self.targets)
        decoder = rf".*{DECODER}(.*\.)?({own})"
        return rf"{decoder}|.*{VISION}(.*\.)?({own}|qkv|proj)" if self.vision else decoder


def add_adapter(model: Any, options: LoraOptions) -> Any:
    """The model with a fresh adapter, which alone is trained; it answers as before until the first step.

    Parameters
    ----------
    model
        Of :func:`medreasoner_train.hub_policy.load_hub_model`; its layers are changed in place.
    options
        Of the adapter.

    Returns
    -------
    model
        A ``peft.PeftModel``; :class:`medreasoner_train.hub_policy.HubPolicy` takes it.

    Raises
    ------
    MissingExtraError
        Without peft.
    ValueError
        If the model has no such matrix.
    """
    peft = require("peft", extra="lora", feature=FEATURE)
    config = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=options.pattern(),
        bias="none",
    )
    with warnings.catch_warnings():  # peft asks transformers by a name that it is about to drop
        warnings.filterwarnings("ignore", r".*gradient_checkpointing", FutureWarning)
        return peft.get_peft_model(model, config)


def save_adapter(model: Any, out: Path, *, state: Mapping[str, Tensor] | None = None) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``, which ``export reasoner --adapter`` reads.

    Parameters
    ----------
    model
        Of :func:`add_adapter`.
    out
        Folder, made if absent.
    state
        The model's whole weights, where FSDP has split them over processes.
    """
    model.save_pretrained(str(out), save_embedding_layers=False, state_dict=state)


@torch.no_grad()
def merged_weights(model: Any) -> dict[str, Tensor]:
    """Weights of the model with its adapter added, under transformers' own names.

    They are what an engine for rollouts is given, and what ``save_pretrained(state_dict=...)`` writes. The model stays
    as it is, to the last bit: adding and taking away again would round it. Matrices without an adapter are no copies.
    """
    base = model.get_base_model()
    found = {
        name.replace(".base_layer.", "."): value for name, value in base.state_dict().items() if ".lora_" not in name
    }
    for name, module in base.named_modules():
        if hasattr(module, "get_delta_weight"):
            weight = found[f"{name}.weight"]
            for adapter in module.active_adapters:
                weight = weight + module.get_delta_weight(adapter).to(weight.dtype)
            found[f"{name}.weight"] = weight
    return found


class AdapterReference:
    """A policy in which the model's adapters are switched off: the frozen reference without a second copy of it.

    Parameters
    ----------
    policy
        How the model is read.
    """

    def __init__(self, policy: HubPolicy) -> None:
        self._policy = policy

    @torch.no_grad()
    def log_probs(
        self,
        model: Any,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        *,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`medreasoner_train.hub_policy.HubPolicy.log_probs`; without gradients."""
        inner = model
        while not hasattr(inner, "disable_adapter"):
            inner = inner.module
        with inner.disable_adapter():
            return self._policy.log_probs(model, prompts, completions, temperature=temperature)
