"""Proves that the files of an export are what its description says, before they become a bundle."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx

from medreasoner.errors import BundleError, MedReasonerError
from medreasoner.reasoner.prompt import load_tokenizer
from medreasoner_export.graph import width
from medreasoner_export.needs import free_disk
from medreasoner_export.stored import load_graph

__all__ = ["check_parts", "check_room", "telling"]


def check_room(out: Path, sources: Sequence[Path]) -> None:
    """Refuse to copy what the disk does not hold.

    Raises
    ------
    BundleError
        With both figures.
    """
    needed = sum(path.stat().st_size for source in sources if source.is_dir() for path in source.glob("*"))
    free = free_disk(out)
    if needed > free:
        raise BundleError(f"{out}: {needed / 1e9:.1f} GB will be written, {free / 1e9:.1f} GB are free there")


def check_parts(source: Path, description: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse an export whose files the runtime would not take.

    Parameters
    ----------
    source
        Its folder.
    description
        Content of its ``export.json``.
    names
        Files that it names, which are there.

    Raises
    ------
    BundleError
        If one leaves the folder through a link, is no graph or tokenizer, or is shorter than its matrix; or if a graph
        keeps weights in a file that the description does not name. The message names the file.
    """
    for name in names:
        if not (source / name).resolve().is_relative_to(source.resolve()):
            raise BundleError(f"{source / name}: it is a link that leaves the folder; export it again")
    section = description["section"]
    for name in section["graphs"].values():
        beside = {
            each.value
            for proto in load_graph(source / name).graph.initializer
            if proto.data_location == onnx.TensorProto.EXTERNAL
            for each in proto.external_data
            if each.key == "location"
        }
        if beside - set(names):
            raise BundleError(f"{source / name}: its weights lie in {min(beside)}, which export.json does not name")
    if "tokenizer" in section:
        load_tokenizer(str(source / section["tokenizer"]))
    for matrix in (section[key] for key in ("embedding", "lm_head") if key in section):
        size = (source / matrix["file"]).stat().st_size
        needed = math.prod(matrix["shape"]) * width(matrix["dtype"])
        if size != needed:
            raise BundleError(
                f"{source / matrix['file']}: {size} bytes, and a matrix of {matrix['shape']} in {matrix['dtype']} "
                f"has {needed}; export it again"
            )


@contextmanager
def telling(out: Path) -> Iterator[None]:
    """Tell a failure to write in our words.

    Raises
    ------
    BundleError
        Naming the folder.
    """
    try:
        yield
    except OSError as err:
        if isinstance(err, MedReasonerError):
            raise
        raise BundleError(f"{out}: it cannot be written ({err.strerror or type(err).__name__})") from err
