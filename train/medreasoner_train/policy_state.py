"""The weights of a model under training, as engines of rollouts take them over."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from medreasoner_train.lora import merged_weights

__all__ = ["as_float32", "policy_state"]


def policy_state(model: Any) -> dict[str, Tensor]:
    """Weights by their names in transformers, on the CPU, without gradients; copied only where they must be.

    Parameters
    ----------
    model
        A model of transformers; one with LoRA layers of peft, which are merged in what is returned and stay as they are
        in the model; or a state dict, such as FSDP gathers.
    """
    if isinstance(model, Mapping):
        state = model
    else:
        state = merged_weights(model) if hasattr(model, "get_base_model") else model.state_dict()
    return {name: tensor.detach().cpu() for name, tensor in state.items()}


def as_float32(tensor: Tensor) -> npt.NDArray[np.float32]:
    """The values of a tensor on the CPU in float32; the same memory if they are that already."""
    array: npt.NDArray[np.float32] = tensor.float().contiguous().numpy()
    return array
