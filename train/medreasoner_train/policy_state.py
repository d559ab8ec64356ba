"""The weights of a model under training, as engines of rollouts take them over."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["as_float32", "policy_state"]

LORA = "base_model.model."  # what peft puts before every name


def policy_state(model: Any) -> dict[str, Tensor]:
    """Weights by their names in transformers, on the CPU, without gradients; copied only where they must be.

    Parameters
    ----------
    model
        A model of transformers; one with LoRA layers of peft, which are merged in what is returned and stay as they are
        in the model; or a state dict, such as FSDP gathers.
    """
    state = model if isinstance(model, Mapping) else _merged(model)
    return {name: tensor.detach().cpu() for name, tensor in state.items()}


def as_float32(tensor: Tensor) -> npt.NDArray[np.float32]:
    """The values of a tensor on the CPU in float32; the same memory if they are that already."""
    array: npt.NDArray[np.float32] = tensor.float().contiguous().numpy()
    return array


@torch.no_grad()
def _merged(model: Any) -> dict[str, Tensor]:
    adapted = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    state = {}
    for name, tensor in model.state_dict().items():
        if ".lora_" in name:
            continue
        module = name.removesuffix(".base_layer.weight")
        if module in adapted and not adapted[module].merged:
            layer = adapted[module]
            tensor = tensor + sum(layer.get_delta_weight(each) for each in layer.active_adapters)
        state[name.removeprefix(LORA).replace(".base_layer.", ".")] = tensor
    return state
