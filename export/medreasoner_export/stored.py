"""The weights of a finished graph, by name: inside of it or in the file beside it, one in memory at a time."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from medreasoner.errors import BundleError
from medreasoner_export.quantise import BLOCK

__all__ = ["StoredWeights", "load_graph"]

# What has as many axes out as it has in.
KEEPS_RANK = ("Add", "Cast", "Concat", "Gelu", "LayerNormalization", "Mul", "Relu", "Softmax", "Split", "Sum")


def load_graph(path: Path) -> onnx.ModelProto:
    """The graph in a file, without the weights beside it, which are proved to be there.

    Raises
    ------
    BundleError
        If it is no ONNX graph, or a weight lies outside of its folder, in no file, or beyond its end; the message names
        the file.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
    except OSError as err:
        raise BundleError(f"{path}: it cannot be read ({err.strerror})") from err
    except Exception as err:  # protobuf's own
        raise BundleError(f"{path} is no ONNX graph, or is damaged; export it again") from err
    if not model.graph.node:
        raise BundleError(f"{path} holds no graph; export it again")
    for proto in model.graph.initializer:
        if proto.data_location == onnx.TensorProto.EXTERNAL:
            _check_outside(path, proto)
    return model


def _check_outside(path: Path, proto: onnx.TensorProto) -> None:
    entries = {each.key: each.value for each in proto.external_data}
    name = entries.get("location", "")
    if not name or Path(name).name != name or "\\" in name or "\0" in name:
        raise BundleError(f"{path}: weight {proto.name[:120]!r} lies in {name[:120]!r}, which is no file beside it")
    file = path.with_name(name)
    if not file.resolve().is_relative_to(path.parent.resolve()):
        raise BundleError(f"{path}: weight {proto.name[:120]!r} lies in {name}, a link that leaves the folder")
    try:
        start = int(entries.get("offset", 0))
        size = math.prod(proto.dims) * helper.tensor_dtype_to_np_dtype(proto.data_type).itemsize
        whole = file.is_file() and start >= 0 and start + size <= file.stat().st_size
    except (ValueError, KeyError) as err:
        raise BundleError(f"{path}: weight {proto.name[:120]!r} is malformed ({err!s:.80})") from err
    if not whole:
        raise BundleError(f"{file}: it does not hold {proto.name[:120]!r} of {path.name}; export it again")


class StoredWeights:
    """Initializers of a graph, and those that it casts to float32 and scales, under the name of what comes out.

    Parameters
    ----------
    model
        The graph, without its external data.
    path
        Where it lies.
    """

    def __init__(self, model: onnx.ModelProto, path: Path) -> None:
        self._path = path
        self._protos = {each.name: each for each in model.graph.initializer}
        self._casts = {
            node.output[0]: node.input[0]
            for node in model.graph.node
            if node.op_type == "Cast" and node.input[0] in self._protos
        }
        self._scales = {
            node.output[0]: node.input[1]
            for node in model.graph.node
            if node.op_type == "Mul" and node.input[0] in self._casts and node.input[1] in self._protos
        }
        scaled = {node.output[0]: node.input[0] for node in model.graph.node if node.output[0] in self._scales}
        self._casts |= {name: self._casts[cast] for name, cast in scaled.items()}
        self._made: dict[str, npt.NDArray[Any]] = {}
        self._producers = {name: node for node in model.graph.node for name in node.output}

    def __contains__(self, name: str) -> bool:
        return name in self._protos or name in self._casts or name in self._made

    def is_matrix(self, name: str) -> bool:
        """Whether this is a weight with two axes."""
        if name in self._made:
            return self._made[name].ndim == 2
        return name in self and len(self._protos[self._casts.get(name, name)].dims) == 2

    @property
    def n_values(self) -> int:
        """Numbers in all of them; of a matrix in four bits the two that each byte holds."""
        return sum(
            int(np.prod(each.dims))
            * (2 if name.endswith(".levels") and len(each.dims) == 3 and each.dims[-1] < BLOCK else 1)
            for name, each in self._protos.items()
        )

    def add(self, name: str, array: npt.NDArray[Any]) -> None:
        """Hold a weight that was worked out from others, until it is dropped."""
        self._made[name] = array

    def drop(self, name: str) -> None:
        """Let go of what was added."""
        del self._made[name]

    def array(self, name: str) -> npt.NDArray[Any]:
        """A weight: float32, or as it is if it is no floating point number.

        Raises
        ------
        BundleError
            If the file beside the graph does not hold it.
        """
        if name in self._made:
            return np.ascontiguousarray(self._made[name])
        proto = self._protos[self._casts.get(name, name)]
        array = (
            self._outside(proto) if proto.data_location == onnx.TensorProto.EXTERNAL else numpy_helper.to_array(proto)
        )
        if name in self._scales:
            return np.asarray(array.astype(np.float32) * self.array(self._scales[name]), np.float32)
        return array.astype(np.float32) if name in self._casts or array.dtype == np.float16 else array

    def half(self, name: str) -> npt.NDArray[np.float16]:
        """A weight in float16.

        Raises
        ------
        BundleError
            If a value is larger than float16 holds.
        """
        array = self.array(name)
        with np.errstate(over="ignore"):
            half = array.astype(np.float16)
        if not np.isfinite(half).all():
            largest = float(np.abs(array.astype(np.float64)).max())
            raise BundleError(f"{self._path.name}: weight {name}: {largest:.4g} does not fit float16; build with fp32")
        return half

    def _outside(self, proto: onnx.TensorProto) -> npt.NDArray[Any]:
        """Mapped from the file, of which the bundle's hash was checked."""
        entries = {each.key: each.value for each in proto.external_data}
        path = self._path.with_name(entries["location"])
        dtype = helper.tensor_dtype_to_np_dtype(proto.data_type)
        try:
            return np.memmap(path, dtype, mode="r", offset=int(entries.get("offset", 0)), shape=tuple(proto.dims))
        except (OSError, ValueError) as err:
            raise BundleError(f"{path}: it does not hold {proto.name} ({err})") from err

    def rank(self, name: str) -> int:
        """Number of axes of a tensor of the graph.

        Raises
        ------
        BundleError
            If the nodes before it do not tell.
        """
        if name in self:
            return len(self._protos[self._casts.get(name, name)].dims)
        node = self._producers.get(name)
        attributes: Mapping[str, Any] = {}
        if node is not None:
            attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        if node is not None and node.op_type == "Transpose":
            return len(attributes["perm"])
        if node is not None and node.op_type == "Reshape" and node.input[1] in self:
            return len(self.array(node.input[1]))
        if node is not None and node.op_type in KEEPS_RANK:
            return self.rank(node.input[0])
        raise BundleError(f"{self._path.name}: how many axes {name} has is not known")
