"""Mixes two finished checkpoints of one start: ``medreasoner-cli train mix``.

What was taught last is learnt at the cost of what was known before; the average of the weights before and after keeps
most of both.

References
----------
M. Wortsman et al., "Robust fine-tuning of zero-shot models" (arXiv 2109.01903).
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from medreasoner._text import one_line
from medreasoner.errors import BundleError
from medreasoner.reasoner.prompt import load_tokenizer
from medreasoner_train.files import appearing
from medreasoner_train.tokenizer import BY_TOKEN, ids_behind

__all__ = ["mix"]

WEIGHTS = "model.safetensors"


def mix(first: Path, second: Path, out: Path, *, share: float) -> Path:
    """Write a checkpoint whose weights are a weighted average; all else is that of the second.

    Where the second's vocabulary has grown behind the first's, the rows of the new tokens are the second's alone.

    Parameters
    ----------
    first, second
        Folders of finished checkpoints with the same tensors.
    out
        Folder to write, made if absent.
    share
        Of the second, in [0, 1].

    Raises
    ------
    BundleError
        If a folder holds no checkpoint, or the two differ in more than their numbers; the message names the folder.
    """
    if not 0 <= share <= 1:
        raise BundleError(f"share: expected a number from 0 to 1, got {share}")
    one, two = _weights(first), _weights(second)
    has_grown = _has_grown(first, second)
    if has_grown:
        one |= {
            name: torch.cat([one[name], two[name][len(one[name]) :]]) for name in BY_TOKEN & one.keys() & two.keys()
        }
    if {name: value.shape for name, value in one.items()} != {name: value.shape for name, value in two.items()}:
        raise BundleError(f"{first} and {second} have other tensors: only checkpoints of one start can be mixed")
    if _config(first, has_grown) != _config(second, has_grown):
        raise BundleError(f"{first} and {second}: their config.json differ: only checkpoints of one start can be mixed")
    if not has_grown and _bytes(first / "tokenizer.json") != _bytes(second / "tokenizer.json"):
        raise BundleError(f"{first} and {second} have other tokenizers: rows of unlike tokens would be averaged")
    mixed = {name: torch.lerp(a.float(), two[name].float(), share).to(two[name].dtype) for name, a in one.items()}
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(second.iterdir()):
        if file.is_file() and file.name != WEIGHTS and file.resolve() != (out / file.name).resolve():
            shutil.copyfile(file, out / file.name)
    with appearing(out / WEIGHTS) as beside:
        save_file(mixed, beside, {"format": "pt"})
    return out


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    try:
        weights: dict[str, torch.Tensor] = load_file(folder / WEIGHTS)
    except Exception as err:  # safetensors raises a class of its own
        raise BundleError(f"{folder}: no finished checkpoint with a readable {WEIGHTS} ({one_line(err)})") from err
    return weights


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _has_grown(first: Path, second: Path) -> bool:
    """Whether the second's tokens are the first's, under the same ids, and some behind them."""
    try:
        old, new = (load_tokenizer(str(each / "tokenizer.json")) for each in (first, second))
    except BundleError:
        return False
    return bool(ids_behind(old, new))


def _config(folder: Path, has_grown: bool) -> object:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise BundleError(f"{folder}: no readable config.json ({one_line(err)})") from err
    if not isinstance(config, dict):
        return config
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for name in ("transformers_version", "dtype", *(["vocab_size"] if has_grown else [])):  # of no weight's meaning
        for part in parts:
            part.pop(name, None)
    return config
