"""How large the numbers in a segmenter's image encoder become on real images: what its int8 engine is scaled by."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from medreasoner._extras import require
from medreasoner.bundle import Bundle
from medreasoner.errors import BundleError
from medreasoner.image import read_image
from medreasoner.segmenter import encoder_input
from medreasoner_export.stored import StoredWeights

__all__ = ["input_ranges", "segmenter_images"]

# Operators whose matrix is in few bits.
ROUNDED = ("DynamicQuantizeMatMul", "MatMulNBits")

Array = npt.NDArray[Any]


def input_ranges(path: Path, feeds: Iterable[Mapping[str, Array]]) -> dict[str, float]:
    """Largest absolute value of each tensor that a graph multiplies with a matrix of weights.

    Parameters
    ----------
    path
        A graph of a bundle.
    feeds
        Inputs of the graph, one run each.

    Raises
    ------
    BundleError
        If there is no input, or a number is not finite.
    """
    ort = require("onnxruntime", extra="cpu", feature="Calibration")
    model = onnx.load(str(path), load_external_data=False)
    stored = StoredWeights(model, path)
    products = [
        node
        for node in model.graph.node
        if node.op_type in ROUNDED or (node.op_type == "MatMul" and stored.is_matrix(node.input[1]))
    ]
    names = sorted({node.input[0] for node in products} - {each.name for each in model.graph.input})
    if not names:
        raise BundleError(f"{path.name}: it has no product with weights that eight bits could compute")
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    settings = ort.SessionOptions()  # the weights beside it are found from the folder of the graph
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    session = ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    ranges = dict.fromkeys(names, 0.0)
    count = 0
    for count, feed in enumerate(feeds, 1):  # noqa: B007  # counted for the check below
        for name, array in zip(names, session.run(names, dict(feed)), strict=True):
            if not np.isfinite(array).all():
                raise BundleError(f"{path.name}: {name} is not finite on an image to calibrate with")
            ranges[name] = max(ranges[name], float(np.abs(array).max()))
    if not count:
        raise BundleError(f"{path.name}: int8 needs at least one image to calibrate with")
    return ranges


def segmenter_images(bundle: Bundle, images: Sequence[str | Path]) -> Iterator[Mapping[str, Array]]:
    """Inputs of the encoder graph for image files, as the runtime would make them.

    Raises
    ------
    ImageReadError
        If one cannot be read.
    """
    for image in images:
        planes, _ = encoder_input(bundle.spec.segmenter, read_image(image))
        yield {"pixel_values": planes[None]}
