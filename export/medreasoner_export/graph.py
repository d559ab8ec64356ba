"""A small typed builder of ONNX graphs, and the one place where weights enter them."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from medreasoner._version import __version__
from medreasoner.errors import BundleError
from medreasoner_export.quantise import BLOCK, INT8_LIMIT, Bits, Rounded, quantise, quantise_rows

__all__ = [
    "BITS",
    "IR_VERSION",
    "MAX_GRAPH_BYTES",
    "OPSET",
    "GraphBuilder",
    "Precision",
    "Rounding",
    "Storage",
    "WeightsFile",
    "are_large",
    "joined",
    "save_graph",
    "store",
    "weights_file",
    "width",
]

OPSET = 20
IR_VERSION = 10
# Protocol buffers hold at most 2 GiB.
MAX_GRAPH_BYTES = 2**31 - 1
# With all weights of a checkpoint in half of that, no single graph of it comes near.
LARGEST_INSIDE = 2**30

Storage: TypeAlias = Literal["float32", "float16", "bfloat16"]
"""Element type of matrices in a file. Arithmetic is float32: the cast is folded when a session is made."""

Precision: TypeAlias = Literal["fp32", "fp16", "int8", "int4"]
"""Arithmetic: float32, float16, or float32 with matrix products of eight- or four-bit weights and eight-bit
activations: in blocks, or in graphs that are `dynamic` by rows and whole tensors."""

BITS: Mapping[Precision, Bits] = {"int8": 8, "int4": 4}
"""Of a weight, at the precisions that round them."""

Rounding: TypeAlias = Callable[[npt.NDArray[Any], str, Bits], Rounded]
"""Makes a matrix (rows, columns) one of few bits, given its name too, as :func:`quantise` does."""

Shape: TypeAlias = Sequence[int | str]

FLOAT, FLOAT16 = int(TensorProto.FLOAT), int(TensorProto.FLOAT16)
INT32, INT64 = TensorProto.INT32, TensorProto.INT64
# Domain of ONNX Runtime's own operators.
MICROSOFT = "com.microsoft"


class WeightsFile:
    """Weights in a file beside their graph, written as they come: ONNX's external data.

    The graph names the file, so both keep their names and stay in one folder.
    """

    ALIGNMENT = 4096  # ONNX Runtime maps the file by pages
    LEAST_BYTES = 1024  # smaller ones stay in the graph, where its checks can see them

    def __init__(self, name: str, file: BinaryIO, *, least_bytes: int = LEAST_BYTES) -> None:
        self.name, self.least_bytes, self._file = name, least_bytes, file

    def add(self, name: str, array: npt.NDArray[Any]) -> onnx.TensorProto:
        """Append a contiguous array and return what stands for it in the graph."""
        self._file.write(bytes(-self._file.tell() % self.ALIGNMENT))
        start = self._file.tell()
        self._file.write(array.reshape(-1).view(np.uint8).data)
        proto = onnx.TensorProto(name=name, dims=array.shape, data_location=TensorProto.EXTERNAL)
        proto.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
        for key, value in (("location", self.name), ("offset", start), ("length", array.nbytes)):
            proto.external_data.add(key=key, value=str(value))
        return proto


@contextmanager
def weights_file(graph: Path, *, wanted: bool = False, every: bool = False) -> Iterator[WeightsFile | None]:
    """The file ``GRAPH.data`` for the weights of a graph from a size on, or None: not `wanted`, they stay inside.

    It takes `every` one, the small ones too, where a kernel shall find them there without the graph.
    """
    path = graph.with_name(graph.name + ".data")
    if not (wanted or every):
        yield None
        return
    with path.open("wb") as file:
        yield WeightsFile(path.name, file, least_bytes=0 if every else WeightsFile.LEAST_BYTES)


def are_large(shapes: Iterable[Sequence[int]], storage: Storage) -> bool:
    """Whether tensors of these shapes belong into a file beside their graph."""
    return sum(math.prod(shape) for shape in shapes) * width(storage) > LARGEST_INSIDE


def width(storage: Storage) -> int:
    """Bytes of a number in a file."""
    return 4 if storage == "float32" else 2


def joined(parts: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Arrays one behind the other along the first axis; float32 if they are of several types."""
    if len({part.dtype for part in parts}) > 1:  # NumPy has no common type for float16 and bfloat16
        parts = [part.astype(np.float32) for part in parts]
    return np.concatenate(parts)


class GraphBuilder:
    """Collects nodes in order of execution. Tensors are named by strings; methods return the names they made.

    Parameters
    ----------
    name
        Name of the graph, for error messages.
    storage
        Element type in which matrices are stored.
    precision
        Of the arithmetic: of all of it if it is ``"fp16"``, else of the products in :meth:`linear`.
    dynamic
        Whether ``"int8"`` means integer products: each row of a weight has one scale, each tensor of activations one
        that is found when it is there. For graphs that read many tokens at once, where this is twice as fast as
        float32; blocks, made for single tokens, are not. Only CPUs have it. A run should then hold one image, since
        those of a batch would share a scale: ``max_rows`` in the metadata says so to the runtime.
    outside
        File that takes the weights; None: they stay in the graph.
    rounding
        How matrices become few bits, where the precision says so.

    Attributes
    ----------
    multiplied
        What each matrix of :meth:`linear` is multiplied with, by the matrix's name.
    """

    def __init__(
        self,
        name: str,
        *,
        storage: Storage = "float32",
        precision: Precision = "fp32",
        dynamic: bool = False,
        outside: WeightsFile | None = None,
        rounding: Rounding = quantise,
    ) -> None:
        self.name = name
        self.storage = storage
        self.precision = precision
        self.is_dynamic = dynamic and precision == "int8"
        self.outside = outside
        self.multiplied: dict[str, str] = {}
        self._rounding = rounding
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._count = 0
        self._n_rounded = 0
        self._n_bytes = 0  # of the weights

    @property
    def real(self) -> int:
        """ONNX's element type of what the graph computes with."""
        return FLOAT16 if self.precision == "fp16" else FLOAT

    def input(self, name: str, dtype: int, shape: Shape) -> str:
        """Declare a graph input; strings in `shape` are dynamic dimensions. Returns the name to compute with.

        A float32 input stays one at any precision, so that whoever runs the graph need not know; one that is declared
        as :attr:`real` is passed as it is.
        """
        self._inputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        return self.op("Cast", name, to=self.real) if dtype == FLOAT != self.real else name

    def output(self, name: str, dtype: int, shape: Shape) -> None:
        """Declare the existing tensor `name` as an output of the graph: as float32, or as it is if it is `real`."""
        self._outputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        if dtype == FLOAT != self.real:
            inner = f"{name}.inner"
            for node in self._nodes:
                node.name = inner if node.name == name else node.name
                for names in (node.input, node.output):
                    names[:] = [inner if each == name else each for each in names]
            self.op("Cast", inner, out=name, to=FLOAT)

    def op(self, kind: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        """Append a node with one output and return the output's name.

        Parameters
        ----------
        kind
            Operator, with ``"com.microsoft."`` before it for ONNX Runtime's own.
        inputs
            Names; ``""`` leaves an optional input out.
        out
            Name of the output, made up if None.
        **attributes
            Of the node.
        """
        return self.ops(kind, *inputs, outputs=(out or self.fresh(kind),), **attributes)[0]

    def ops(self, kind: str, *inputs: str, outputs: int | Sequence[str], **attributes: Any) -> tuple[str, ...]:
        """Append a node with several outputs: how many, or their names (``""`` leaves one out)."""
        names = tuple(self.fresh(kind) for _ in range(outputs)) if isinstance(outputs, int) else tuple(outputs)
        domain, _, operator = kind.rpartition(".")
        node = helper.make_node(operator, list(inputs), list(names), domain=domain, name=names[0], **attributes)
        self._nodes.append(node)
        return names

    def total(self, *parts: str) -> str:
        """The sum of tensors before a LayerNormalization."""
        # ONNX Runtime 1.32 makes of an Add and that norm a SkipLayerNormalization, which takes seven times as long on
        # the CPU (256 x 128: 195 us instead of 27); a Sum it leaves alone.
        return self.op("Sum", *parts)

    def ints(self, *values: int) -> str:
        """A constant (n,) int64, shared between equal ones."""
        name = "ints_" + "_".join(str(value) for value in values)
        return self.constant(name, np.array(values, dtype=np.int64))

    def constant(self, name: str, array: npt.NDArray[Any]) -> str:
        """A constant in its own type, or, a float32, in that of the arithmetic; shared between equal names."""
        if name not in self._initializers:
            if self.precision == "fp16" and array.dtype == np.float32:
                array = store(array, "float16", name)
            self._initializers[name] = numpy_helper.from_array(array, name)
        return name

    def weight(self, name: str, array: npt.NDArray[Any], *, exact: bool = False) -> str:
        """Add a weight and return the name of its value.

        Matrices are stored as `storage` with a Cast behind them; vectors are small and stay float32, and so does what
        is `exact`: a matrix that is no longer the checkpoint's own and would be rounded again. At the precision fp16
        everything is stored, and used, as float16, and in a `dynamic` graph of eight bits matrices and kernels are
        stored in eight, and used as float32.

        Raises
        ------
        BundleError
            If a value does not fit `storage`, or all weights together one file.
        """
        if self.precision == "fp16":
            self.keep(name, store(array, "float16", name))
            return name
        if self.is_dynamic and array.ndim in (2, 4) and array.shape[0] > 1:
            return self._stored_in_eight(name, array)
        if array.ndim < 2 or exact or self.storage == "float32":
            self.keep(name, store(array, "float32", name))
            return name
        stored = f"{name}.{self.storage}"
        self.keep(stored, store(array, self.storage, name))
        return self.op("Cast", stored, out=name, to=FLOAT)

    def _stored_in_eight(self, name: str, array: npt.NDArray[Any]) -> str:
        """A matrix (in, out) or a kernel (out, in, height, width): the runtime applies the scales when it loads it."""
        is_matrix = array.ndim == 2
        rounded = quantise_rows(array.T if is_matrix else array.reshape(len(array), -1), name, INT8_LIMIT)
        levels = rounded.levels if is_matrix else np.ascontiguousarray(rounded.levels.T).reshape(array.shape)
        self.keep(f"{name}.int8", levels)
        self.keep(f"{name}.scale", rounded.scales if is_matrix else rounded.scales.reshape(-1, 1, 1, 1))
        return self.op("Mul", self.op("Cast", f"{name}.int8", to=FLOAT), f"{name}.scale", out=name)

    def keep(self, name: str, array: npt.NDArray[Any]) -> None:
        """Add an initializer in its own type, beside the graph if it is large and there is a file for it.

        Raises
        ------
        BundleError
            If all of them together do not fit one file.
        """
        if self.outside is not None and array.nbytes >= self.outside.least_bytes:
            self._initializers[name] = self.outside.add(name, array)
            return
        self._n_bytes += array.nbytes
        if self._n_bytes > MAX_GRAPH_BYTES:  # told now, not after the whole model was copied into the message
            raise BundleError(f"{self.name}: its weights do not fit one ONNX file of 2 GiB")
        self._initializers[name] = numpy_helper.from_array(array, name)

    def linear(
        self,
        x: str,
        name: str,
        weight: npt.NDArray[Any],
        bias: npt.NDArray[Any] | None = None,
        *,
        has_outliers: bool = False,
    ) -> str:
        """``x @ weight.T + bias``; `weight` is (out, in) as in torch.

        It is stored transposed; or in few bits if the precision says so and, where these come in blocks, its columns
        divide into them. Where `x` `has_outliers`, one scale for all of it would be too coarse for the rest: a
        `dynamic` graph computes that product in float32.
        """
        self.multiplied[f"{name}.weight"] = x
        if self.is_dynamic and not has_outliers:
            return self._dynamic_product(x, name, weight, bias)
        if self.precision in BITS and not self.is_dynamic and weight.shape[1] % BLOCK == 0:
            y = self._rounded_product(x, f"{name}.weight", weight, BITS[self.precision])
        else:
            y = self.op("MatMul", x, self.weight(f"{name}.weight", weight.T))
        return y if bias is None else self.op("Add", y, self.weight(f"{name}.bias", bias))

    def _dynamic_product(self, x: str, name: str, weight: npt.NDArray[Any], bias: npt.NDArray[Any] | None) -> str:
        matrix = quantise_rows(weight, f"{name}.weight")
        parts = [f"{name}.weight.{part}" for part in ("levels", "scales")]
        self.keep(parts[0], matrix.levels)
        self.keep(parts[1], matrix.scales)
        self._n_rounded += 1
        last = [] if bias is None else ["", self.weight(f"{name}.bias", bias)]  # without a zero point
        return self.op("com.microsoft.DynamicQuantizeMatMul", x, *parts, *last)

    def _rounded_product(self, x: str, name: str, weight: npt.NDArray[Any], bits: Bits) -> str:
        matrix = self._rounding(weight, name, bits)
        for part, array in (("levels", matrix.levels), ("scales", matrix.scales), ("zeros", matrix.zero_points)):
            self.keep(f"{name}.{part}", array)
        self._n_rounded += 1
        rows, columns = weight.shape
        return self.op(
            "com.microsoft.MatMulNBits",
            x,
            *(f"{name}.{part}" for part in ("levels", "scales", "zeros")),
            K=columns,
            N=rows,
            bits=bits,
            block_size=BLOCK,
            accuracy_level=4,  # activations in eight bits, block by block
        )

    def model(self, metadata: Mapping[str, str]) -> onnx.ModelProto:
        """The finished model, with `metadata` and the versions of what made it as ``metadata_props``.

        Raises
        ------
        BundleError
            If few bits were asked for and no matrix has columns that divide into blocks.
        """
        if self.precision in BITS and not self._n_rounded:
            raise BundleError(f"{self.name}: no matrix has columns that are a multiple of {BLOCK}, as few bits need")
        graph = helper.make_graph(
            self._nodes, self.name, self._inputs, self._outputs, list(self._initializers.values())
        )
        opsets = [helper.make_opsetid("", OPSET)]
        if any(node.domain == MICROSOFT for node in self._nodes):
            opsets.append(helper.make_opsetid(MICROSOFT, 1))
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="medreasoner")
        model.producer_version = __version__
        properties = {"opset": str(OPSET), "storage": self.storage, "precision": self.precision}
        if self.is_dynamic:
            properties["max_rows"] = "1"
        helper.set_model_props(model, {**properties, **metadata})
        return model

    def fresh(self, kind: str) -> str:
        """A tensor name that is not yet used."""
        self._count += 1
        return f"{kind.rpartition('.')[2].lower()}_{self._count}"


def store(array: npt.NDArray[Any], storage: Storage, name: str) -> npt.NDArray[Any]:
    """`array` as a contiguous array of the element type `storage`.

    Raises
    ------
    BundleError
        If a value overflows: bfloat16 weights can exceed float16.
    """
    dtype = np.dtype(ml_dtypes.bfloat16) if storage == "bfloat16" else np.dtype(storage)
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(array.astype(dtype, copy=False))
    if not np.isfinite(stored).all():
        largest = float(np.abs(array.astype(np.float64)).max())
        wide = "export with --precision fp32, and --weights bfloat16 or float32"
        advice = wide if storage == "float16" else "the checkpoint is damaged"
        raise BundleError(f"weight {name}: {largest:.4g} does not fit {storage}; {advice}")
    return stored


def save_graph(model: onnx.ModelProto, path: Path) -> None:
    """Write `model` with the weights that are inside.

    Raises
    ------
    BundleError
        If it is larger than one file can hold.
    """
    size = model.ByteSize()
    if size > MAX_GRAPH_BYTES:
        raise BundleError(f"{path.name}: {size / 2**30:.1f} GiB do not fit one ONNX file of 2 GiB")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString(deterministic=True))
