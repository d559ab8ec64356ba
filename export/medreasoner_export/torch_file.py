"""Tensors of a ``.pt`` or ``.pth`` file, read without running what it may hold."""

import pickle
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy.typing as npt

from medreasoner._extras import require
from medreasoner._text import one_line
from medreasoner.errors import BundleError
from medreasoner_export.checkpoint import Entry

__all__ = ["read_torch_file"]

# Where training scripts put the weights beside optimiser and epoch, and what a parallel run puts before their names.
NESTED = ("model", "state_dict", "model_state_dict")
PARALLEL = "module."


def read_torch_file(path: Path) -> dict[str, Entry]:
    """The tensors in `path` by their names there.

    Raises
    ------
    BundleError
        If the file is missing, damaged, holds no weights, or holds objects that are not data: those can run code.
    MissingExtraError
        If torch is not installed.
    """
    torch = require("torch", extra="export", feature="Reading a .pth file")
    content = _load(torch, path)
    for key in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise BundleError(f"{path}: expected named weights, got {type(content).__name__}")
    codes = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    return {
        str(name).removeprefix(PARALLEL): Entry(
            file=path,
            dtype=codes.get(tensor.dtype, str(tensor.dtype)),
            shape=tuple(tensor.shape),
            read=partial(_array, torch, tensor),
        )
        for name, tensor in content.items()
        if isinstance(tensor, torch.Tensor)
    }


def _load(torch: Any, path: Path) -> Any:
    settings: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of what it then refuses
            try:
                return torch.load(path, mmap=True, **settings)
            except RuntimeError as err:
                if "mmap" not in str(err):
                    raise
                return torch.load(path, **settings)  # the form before PyTorch 1.6
    except FileNotFoundError:
        raise BundleError(f"{path} is missing") from None
    except pickle.UnpicklingError as err:
        raise BundleError(
            f"{path}: it is no file of PyTorch weights, or holds objects beside them, which could run code; "
            "save the state_dict alone"
        ) from err
    except Exception as err:  # PyTorch raises many kinds for a damaged file
        raise BundleError(f"{path}: it cannot be read as PyTorch weights ({one_line(err)})") from err


def _array(torch: Any, tensor: Any) -> npt.NDArray[Any]:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:  # NumPy has no such type of its own
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)  # type: ignore[no-any-return]
    return tensor.numpy()  # type: ignore[no-any-return]
