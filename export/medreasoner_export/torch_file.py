"""Tensors of a ``.pt`` or ``.pth`` file, read without running what it may hold."""

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy.typing as npt

from medreasoner._extras import require
from medreasoner._text import one_line, printable
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
    if not path.is_file():
        raise BundleError(f"{path} is missing, or no file")
    if not path.stat().st_size:
        raise BundleError(f"{path}: it cannot be read as PyTorch weights (it is empty); get it again")
    torch = require("torch", extra="export", feature="Reading a .pth file")
    content = _load(torch, path)
    for key in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise BundleError(f"{path}: expected named weights, got {type(content).__name__}")
    found: dict[str, Entry] = {}
    for key, tensor in content.items():
        name = str(key).removeprefix(PARALLEL)
        if name in found:
            raise BundleError(f"{path}: tensor {printable(name)[:120]} is there with and without {PARALLEL!r}")
        if isinstance(tensor, torch.Tensor):
            found[name] = _entry(torch, path, name, tensor)
    return found


def _load(torch: Any, path: Path) -> Any:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch itself does not look at the checksums
            if damaged is not None:
                raise BundleError(f"{path}: it is damaged: {printable(damaged)[:120]} is not what was written")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of what it then refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except BundleError:
        raise
    except pickle.UnpicklingError as err:
        raise BundleError(
            f"{path}: it is no file of PyTorch weights, or holds objects beside them, which could run code; "
            "save the state_dict alone"
        ) from err
    except Exception as err:  # PyTorch raises many kinds for a damaged file
        words = one_line(err)
        reason = words if " " in words else type(err).__name__  # a KeyError's is only a number
        raise BundleError(f"{path}: it cannot be read as PyTorch weights ({reason}); get it again") from err


def _entry(torch: Any, path: Path, name: str, tensor: Any) -> Entry:
    """A tensor that is plain: dense, on the CPU, and no larger than what is stored of it."""
    plain = tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_meta
    if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise BundleError(f"{path}: tensor {printable(name)[:120]} is not stored element by element")
    codes = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    dtype = codes.get(tensor.dtype, str(tensor.dtype))
    return Entry(file=path, dtype=dtype, shape=tuple(tensor.shape), read=partial(_array, torch, tensor))


def _array(torch: Any, tensor: Any) -> npt.NDArray[Any]:
    tensor = tensor.detach().resolve_neg().contiguous()
    if tensor.dtype == torch.bfloat16:  # NumPy has no such type of its own
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)  # type: ignore[no-any-return]
    return tensor.numpy()  # type: ignore[no-any-return]
