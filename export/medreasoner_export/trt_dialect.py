"""A bundle's graph in the dialect that TensorRT takes: standard ONNX operators, fixed image, static key-value buffer.

The graphs are rewritten from those of the bundle, and not built a second time from the checkpoint. A bundle is what was
verified, measured and signed by its hashes, and it is what a machine that builds engines has; the checkpoint may be
neither there nor unchanged. One description of each model stays: all families of segmenters come through the same
dozen operators, so that a new one needs nothing here. What is rewritten are ONNX Runtime's own operators (see
:mod:`medreasoner_export.standard_ops`); the weights are the bundle's, number for number.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from medreasoner.errors import BundleError
from medreasoner_export.graph import FLOAT16, MICROSOFT, OPSET, WeightsFile
from medreasoner_export.standard_graph import StandardGraph
from medreasoner_export.standard_ops import EXPANSIONS
from medreasoner_export.stored import StoredWeights, load_graph
from medreasoner_export.trt_plan import EnginePlan

__all__ = ["trt_graph"]


def trt_graph(
    path: Path,
    plan: EnginePlan,
    *,
    half: bool = False,
    ranges: Mapping[str, float] | None = None,
    metadata: Mapping[str, str],
    outside: WeightsFile | None = None,
) -> onnx.ModelProto:
    """The graph at `path` with the tensors of `plan`.

    Parameters
    ----------
    path
        A graph of a bundle.
    plan
        Its engine.
    half
        Compute products in float16, and all else in float32.
    ranges
        What :func:`medreasoner_export.calibrate.input_ranges` measured on this graph, to compute those products in
        int8 with explicit QuantizeLinear and DequantizeLinear.
    metadata
        Entries of ``metadata_props``.
    outside
        File for the weights; None: they stay in the graph.

    Raises
    ------
    BundleError
        If the graph has an operator, or a form of one, that this package does not export, or a weight does not fit
        float16.
    """
    model = load_graph(path)
    opset = max((each.version for each in model.opset_import if not each.domain), default=0)
    if opset != OPSET:
        raise BundleError(f"{path}: opset {opset}, expected {OPSET}; export the bundle with this release")
    stored = StoredWeights(model, path)
    g = StandardGraph(plan.name, stored, half=half, head_dim=plan.head_dim, ranges=ranges, outside=outside)
    for each in plan.inputs:
        g.input(each.name, helper.np_dtype_to_tensor_dtype(np.dtype(each.dtype)), each.shape)
    for node in model.graph.node:
        if node.output[0] not in stored:  # else a weight that was only cast
            _rewrite(g, node)
    for each in plan.outputs:
        g.output(each.name, helper.np_dtype_to_tensor_dtype(np.dtype(each.dtype)), each.shape)
    # What limits a batch is gone with the products that it was said of.
    source = {each.key: each.value for each in model.metadata_props if each.key != "max_rows"}
    precision = {
        "precision": "int8" if ranges else "fp16" if half else "fp32",
        "storage": "float16" if half else "float32",
    }
    return g.model({**source, **precision, "dialect": "trt", **metadata})


def _rewrite(g: StandardGraph, node: onnx.NodeProto) -> None:
    expansion = EXPANSIONS.get(node.op_type)
    if node.op_type == "Cast" and helper.get_attribute_value(node.attribute[0]) == FLOAT16:
        g.op("Identity", g.read(node.input[0]), out=node.output[0])  # the engine's precision is its own
    elif expansion is not None:
        attributes: dict[str, Any] = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        expansion(g, node, attributes)
    elif node.domain == MICROSOFT:
        raise BundleError(f"{g.name}: {node.op_type} has no form in standard operators; please report this")
    else:
        g.copy(node, [g.read(each) for each in node.input])
