"""A SAM that ``optimum`` exported to ONNX: its two graphs, put into the form of ours without a change to their numbers.

optimum's encoder also gives the codes of the embedding's places, which are the same for every image and become a
constant of the decoder. Its decoder takes points alone, adds the padding point itself, and gives the three masks for
ambiguous prompts: hence the prompt mode ``points`` and the best of three. Graphs are data, but not only: nothing but
ONNX's standard operators is accepted, and weights only from files in the folder.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.compose import add_prefix_graph
from onnx.reference import ReferenceEvaluator

from medreasoner._text import one_line, printable
from medreasoner.errors import BundleError
from medreasoner_export.checkpoint import read_json, sha256_of
from medreasoner_export.graph import FLOAT, INT64, IR_VERSION, OPSET, WeightsFile

__all__ = ["OptimumSam", "is_optimum", "open_optimum"]

ENCODER, DECODER = "vision_encoder.onnx", "prompt_encoder_mask_decoder.onnx"
PLACES = "image_positional_embeddings"
ENCODER_OUTPUTS = {"image_embeddings": 4, PLACES: 4}
DECODER_INPUTS = {"input_points": 4, "input_labels": 3, "image_embeddings": 4, PLACES: 4}
DECODER_OUTPUTS = {"iou_scores": 3, "pred_masks": 5}
# From 18 to our own 20 the operators were only widened, but for these two, which no SAM has.
OPSETS, CHANGED = range(18, OPSET + 1), {"DFT", "GridSample"}
# Before the names in their graphs, so that none of ours is among them.
PREFIX = "optimum."


def is_optimum(path: Path) -> bool:
    """Whether `path` is a folder of ONNX graphs without the weights that they were made from."""
    return path.is_dir() and any(path.glob("*.onnx")) and not any(path.glob("*.safetensors"))


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimumSam:
    """The two graphs, checked.

    Attributes
    ----------
    path
        Their folder.
    image_size, mask_size
        Sides in pixels of the images and masks.
    n_masks
        That the decoder gives.
    files
        The graphs, then the files of their weights.
    """

    path: Path
    encoder: onnx.ModelProto
    decoder: onnx.ModelProto
    image_size: int
    mask_size: int
    n_masks: int
    files: tuple[Path, ...]

    @property
    def recognised(self) -> str:
        """What it is, in words."""
        return f"SAM as optimum exported it, images of {self.image_size} px, prompts of points alone"

    @property
    def size_bytes(self) -> int:
        """Of all files."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def inside_bytes(self) -> int:
        """Of the graphs with what of the weights is inside."""
        return int(self.encoder.ByteSize() + self.decoder.ByteSize())

    @property
    def weights_outside(self) -> bool:
        """Whether weights lie in files of their own."""
        return len(self.files) > 2

    def sha256(self) -> str:
        """Digest of the lines ``digest  name`` of the files."""
        text = "".join(f"{sha256_of(file)}  {file.name}\n" for file in self.files)
        return hashlib.sha256(text.encode()).hexdigest()

    def encoder_graph(self, metadata: Mapping[str, str], outside: WeightsFile | None) -> onnx.ModelProto:
        """From ``pixel_values`` (batch, 3, S, S) to ``image_embedding`` (batch, C, grid, grid), float32."""
        graph = _part(self.encoder.graph, ["image_embeddings"])
        graph = add_prefix_graph(graph, PREFIX)
        inside, outs = PREFIX + "pixel_values", PREFIX + "image_embeddings"
        size, channels, grid = self.image_size, *self._codes().shape[1:3]
        nodes = [
            helper.make_node("Identity", ["pixel_values"], [inside]),
            *graph.node,
            helper.make_node("Identity", [outs], ["image_embedding"]),
        ]
        inputs = [helper.make_tensor_value_info("pixel_values", FLOAT, ["batch", 3, size, size])]
        outputs = [helper.make_tensor_value_info("image_embedding", FLOAT, ["batch", channels, grid, grid])]
        return self._model(nodes, graph, inputs, outputs, metadata, outside)

    def decoder_graph(self, metadata: Mapping[str, str], outside: WeightsFile | None) -> onnx.ModelProto:
        """As :func:`~medreasoner_export.sam_decoder.sam_decoder_graph` has it; the last point must be padding.

        optimum's graph has a dimension for images and one for the prompts of each: of one image with n prompts the
        latter is n, of n images with a prompt each it is 1.
        """
        graph = add_prefix_graph(_part(self.decoder.graph, list(DECODER_OUTPUTS)), PREFIX)
        codes = self._codes()
        channels, grid, mask = codes.shape[1], codes.shape[2], self.mask_size
        constants = {
            "codes": codes, "zero": [0], "one": [1], "two": [2], "last": [-1], "ones": [1, 1, 1],
            "masks": [-1, self.n_masks, mask, mask], "scores": [-1, self.n_masks],
        }  # fmt: skip
        before = [
            ("Shape", ["image_embedding"], "embedding_shape"),
            ("Slice", ["embedding_shape", "zero", "one"], "images"),
            ("Slice", ["points", "zero", "last", "one"], "own_points"),
            ("Slice", ["labels", "zero", "last", "one"], "own_labels"),
            ("Shape", ["own_labels"], "labels_shape"),
            ("Slice", ["labels_shape", "one", "two"], "n_points"),
            ("Concat", ["images", "last", "n_points"], "labels_grid"),
            ("Concat", ["labels_grid", "two"], "points_grid"),
            ("Concat", ["images", "ones"], "codes_grid"),
            ("Reshape", ["own_points", "points_grid"], PREFIX + "input_points"),
            ("Reshape", ["own_labels", "labels_grid"], PREFIX + "input_labels"),
            ("Expand", ["codes", "codes_grid"], PREFIX + PLACES),
            ("Identity", ["image_embedding"], PREFIX + "image_embeddings"),
        ]
        after = [
            ("Reshape", [PREFIX + "pred_masks", "masks"], "mask_logits"),
            ("Reshape", [PREFIX + "iou_scores", "scores"], "predicted_iou"),
        ]
        nodes = [*_nodes(before), *graph.node, *_nodes(after)]
        inputs = [
            helper.make_tensor_value_info("image_embedding", FLOAT, ["image_batch", channels, grid, grid]),
            helper.make_tensor_value_info("points", FLOAT, ["batch", "n_points", 2]),
            helper.make_tensor_value_info("labels", INT64, ["batch", "n_points"]),
        ]
        outputs = [
            helper.make_tensor_value_info("mask_logits", FLOAT, ["batch", self.n_masks, mask, mask]),
            helper.make_tensor_value_info("predicted_iou", FLOAT, ["batch", self.n_masks]),
        ]
        model = self._model(nodes, graph, inputs, outputs, metadata, outside)
        arrays = {
            name: value if isinstance(value, np.ndarray) else np.array(value) for name, value in constants.items()
        }
        model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
        return model

    def _codes(self) -> npt.NDArray[np.float32]:
        """(1, C, grid, grid) float32: the codes of the embedding's places, worked out from the encoder's graph."""
        graph = _part(self.encoder.graph, [PLACES])
        if any(node.op_type == "Conv" for node in graph.node):
            raise BundleError(f"{self.path / ENCODER}: {PLACES} depends on the image; export it again with optimum")
        for tensor in graph.initializer:
            tensor.CopyFrom(numpy_helper.from_array(_values(tensor, self.path), tensor.name))
        model = helper.make_model(graph, opset_imports=self.encoder.opset_import, ir_version=self.encoder.ir_version)
        pixels = np.zeros((1, 3, self.image_size, self.image_size), np.float32)
        try:
            (codes,) = ReferenceEvaluator(model).run(None, {"pixel_values": pixels})
        except Exception as err:  # whatever the evaluator makes of a graph that is not optimum's
            raise BundleError(f"{self.path / ENCODER}: {PLACES} cannot be worked out ({one_line(err)})") from err
        codes = np.asarray(codes, np.float32)
        if codes.ndim != 4 or codes.shape[0] != 1 or codes.shape[2] != codes.shape[3]:
            raise BundleError(f"{self.path / ENCODER}: {PLACES}: expected (1, C, grid, grid), got {codes.shape}")
        return codes

    def _model(
        self,
        nodes: list[onnx.NodeProto],
        graph: onnx.GraphProto,
        inputs: list[onnx.ValueInfoProto],
        outputs: list[onnx.ValueInfoProto],
        metadata: Mapping[str, str],
        outside: WeightsFile | None,
    ) -> onnx.ModelProto:
        """The finished graph, the weights in files moved to `outside` or into it."""
        weights = []
        for tensor in graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                values = _values(tensor, self.path)
                if outside is not None and values.nbytes >= outside.LEAST_BYTES:
                    tensor = outside.add(tensor.name, values)
                else:
                    tensor = numpy_helper.from_array(values, tensor.name)
            weights.append(tensor)
        own = helper.make_graph(nodes, graph.name, inputs, outputs, weights)
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(own, opset_imports=opsets, ir_version=IR_VERSION, producer_name="medreasoner")
        helper.set_model_props(model, {"opset": str(OPSET), "storage": "float32", "precision": "fp32", **metadata})
        return model


def open_optimum(folder: Path) -> OptimumSam:
    """The graphs in a folder that ``optimum-cli export onnx`` wrote, and what they are.

    Raises
    ------
    BundleError
        If one is missing, damaged, of another model, or holds what a SAM's graph has no use for.
    """
    missing = [name for name in (ENCODER, DECODER) if not (folder / name).is_file()]
    if missing:
        raise BundleError(
            f"{folder}: {missing[0]} is missing: a SAM of optimum is {ENCODER} and {DECODER}, "
            "which optimum-cli export onnx writes without --monolith"
        )
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "sam":
        raise BundleError(f"{folder / 'config.json'}: model_type: expected 'sam', got {kind!r:.80}")
    encoder, decoder = _read(folder / ENCODER), _read(folder / DECODER)
    (pixels,) = _shapes(folder / ENCODER, encoder.graph.input, {"pixel_values": 4})
    _shapes(folder / ENCODER, encoder.graph.output, ENCODER_OUTPUTS)
    _shapes(folder / DECODER, decoder.graph.input, DECODER_INPUTS)
    _, masks = _shapes(folder / DECODER, decoder.graph.output, DECODER_OUTPUTS)
    if pixels[1] != 3 or pixels[2] != pixels[3] or not pixels[2]:
        raise BundleError(f"{folder / ENCODER}: pixel_values: expected squares of a fixed size, got {pixels}")
    if masks[3] != masks[4] or not all(masks[2:]):
        raise BundleError(f"{folder / DECODER}: pred_masks: expected squares of a fixed size, got {masks}")
    beside = {location for model in (encoder, decoder) for location in _locations(model)}
    return OptimumSam(
        path=folder,
        encoder=encoder,
        decoder=decoder,
        image_size=pixels[2],
        mask_size=masks[3],
        n_masks=masks[2],
        files=(folder / ENCODER, folder / DECODER, *(folder / name for name in sorted(beside))),
    )


def _read(path: Path) -> onnx.ModelProto:
    """The model in a file, its weights left where they are; refused if it is anything but standard operators."""
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as err:  # protobuf has errors of its own
        raise BundleError(f"{path} is no ONNX graph, or is truncated ({one_line(err)})") from err
    domains = {node.domain for node in _all_nodes(model.graph)} | {each.domain for each in model.opset_import}
    strange = sorted(domains - {"", "ai.onnx"})
    if strange or model.functions:
        named = printable(strange[0])[:80] if strange else "functions of its own"
        raise BundleError(f"{path}: only ONNX's standard operators are accepted, it uses {named}")
    versions = [each.version for each in model.opset_import]
    if len(versions) != 1 or versions[0] not in OPSETS or CHANGED & {node.op_type for node in _all_nodes(model.graph)}:
        raise BundleError(f"{path}: opset {versions}; export it again with --opset 18")
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            _span(tensor, path.parent)
    if any(each.data_location == TensorProto.EXTERNAL for each in _constants(model.graph)):
        raise BundleError(f"{path}: a constant of a node lies in another file; only initializers may")
    try:
        onnx.checker.check_model(str(path))
    except Exception as err:  # the checker has errors of several kinds
        raise BundleError(f"{path} is no sound ONNX graph ({one_line(err)})") from err
    return model


def _shapes(path: Path, found: Iterable[onnx.ValueInfoProto], wanted: Mapping[str, int]) -> list[list[int]]:
    """Shapes of what is `wanted`, by name with the number of dimensions; 0 stands for a size that varies."""
    values = {value.name: value.type.tensor_type for value in found}
    if values.keys() != wanted.keys():
        have, want = (", ".join(sorted(map(printable, names)))[:160] for names in (values, wanted))
        raise BundleError(f"{path}: expected {want}, as optimum-onnx 0.1 writes them, got {have}")
    for name, rank in wanted.items():
        real = INT64 if name == "input_labels" else FLOAT
        if values[name].elem_type != real or len(values[name].shape.dim) != rank:
            raise BundleError(f"{path}: {name}: expected {rank} dimensions of ONNX's type {real}")
    return [[int(side.dim_value) for side in values[name].shape.dim] for name in wanted]


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and those in its nodes."""
    yield graph
    for node in graph.node:
        yield from _graphs_of(node)


def _graphs_of(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            yield from _graphs(inner)


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for each in _graphs(graph):
        yield from each.node


def _constants(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Tensors that are not initializers of the graph itself."""
    for node in _all_nodes(graph):
        for attribute in node.attribute:
            yield from (*attribute.tensors, *([attribute.t] if attribute.HasField("t") else []))
    for inner in list(_graphs(graph))[1:]:
        yield from inner.initializer


def _locations(model: onnx.ModelProto) -> Iterator[str]:
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            yield next(entry.value for entry in tensor.external_data if entry.key == "location")


def _span(tensor: onnx.TensorProto, folder: Path) -> tuple[Path, int]:
    """File and first byte of a weight that lies in a file, if that is one in the folder and long enough."""
    told = {entry.key: entry.value for entry in tensor.external_data}
    name, shown = told.get("location", ""), printable(tensor.name)[:80]
    path = folder / name
    if not name or Path(name).name != name or path.is_symlink() or not path.is_file():
        raise BundleError(f"{folder}: weight {shown} lies in {printable(name)[:80]!r}, which is no file of the folder")
    try:
        start = int(told.get("offset", "0"))
        needed = int(np.prod(tensor.dims, dtype=np.int64)) * _dtype(tensor).itemsize
        length = int(told.get("length", needed))
    except (ValueError, KeyError, TypeError) as err:
        raise BundleError(f"{path}: weight {shown} has a damaged place ({one_line(err)})") from err
    if start < 0 or length != needed or start + needed > path.stat().st_size:
        raise BundleError(f"{path} is truncated, or weight {shown} has a damaged place")
    return path, start


def _dtype(tensor: onnx.TensorProto) -> np.dtype[Any]:
    dtype: np.dtype[Any] = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return dtype


def _values(tensor: onnx.TensorProto, folder: Path) -> npt.NDArray[Any]:
    """A weight, mapped if it lies in a file."""
    if tensor.data_location != TensorProto.EXTERNAL:
        array: npt.NDArray[Any] = numpy_helper.to_array(tensor)
        return array
    path, start = _span(tensor, folder)
    return np.memmap(path, dtype=_dtype(tensor), mode="r", offset=start, shape=tuple(tensor.dims))


def _part(graph: onnx.GraphProto, outputs: list[str]) -> onnx.GraphProto:
    """What of a graph makes `outputs`, as a graph of its own with all inputs."""
    wanted, nodes = set(outputs), []
    for node in reversed(graph.node):
        if wanted & set(node.output):
            nodes.append(node)
            wanted |= {name for each in _graphs_of(node) for inner in each.node for name in inner.input}
            wanted |= set(node.input)
    return helper.make_graph(
        nodes[::-1],
        graph.name or "graph",
        list(graph.input),
        [each for each in graph.output if each.name in outputs],
        [each for each in graph.initializer if each.name in wanted],
    )


def _nodes(rows: Iterable[tuple[str, list[str], str]]) -> list[onnx.NodeProto]:
    return [
        helper.make_node(kind, inputs, [output], name=output, **({"axis": 0} if kind == "Concat" else {}))
        for kind, inputs, output in rows
    ]
