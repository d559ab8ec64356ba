"""Tensors that FSDP has split over processes, and the same whole."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = ["gathered", "like"]


def gathered(state: Any, *, keep: bool = True) -> Any:
    """A tree of dicts and lists with whole tensors in the place of split ones, on the CPU; others stay what they are.

    All processes take part, with trees of one order. Those that do not `keep` it get None for each split tensor, and
    never hold more than one of them as a whole.
    """
    if isinstance(state, DTensor):
        whole: Tensor = state.full_tensor().detach()
        return whole.cpu() if keep else None
    if isinstance(state, Mapping):
        return {name: gathered(value, keep=keep) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(gathered(value, keep=keep) for value in state)
    return state


def like(whole: Tensor, own: Tensor) -> Tensor:
    """A whole tensor split as `own` is, if that is; each process takes its part, nothing is sent.

    Raises
    ------
    ValueError
        If they are of different shapes.
    """
    if not isinstance(own, DTensor):
        return whole
    if whole.shape != own.shape:
        raise ValueError(f"a tensor of the shape {tuple(whole.shape)} in the place of {tuple(own.shape)}")
    return distribute_tensor(whole.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
