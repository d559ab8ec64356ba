"""A decoder's matrices in four bits by the numbers that prompts send through it, a layer at a time.

Each layer sees what the layers before it give in four bits, so that it makes up for their errors too. In memory are one
layer, the moments of its inputs, and the prompts' hidden states.
"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from medreasoner._extras import require
from medreasoner.errors import BundleError
from medreasoner.spec import ReasonerSpec
from medreasoner_export.checkpoint import Weights
from medreasoner_export.graph import Precision, Storage, save_graph, weights_file
from medreasoner_export.prompts import State
from medreasoner_export.quantise import Bits, Rounded
from medreasoner_export.qwen_config import QwenConfig
from medreasoner_export.qwen_decoder import layer_graph
from medreasoner_export.rounding import Moments, calibrated

__all__ = ["LayerwiseRounding"]

OUTPUT = "layer_output"


class LayerwiseRounding:
    """Rounds the decoder's matrices, called in the order of its layers: a `medreasoner_export.graph.Rounding`.

    Parameters
    ----------
    checkpoint, config, storage
        Of the decoder.
    spec
        Of the reasoner.
    states
        Of the prompts before the first layer; they are changed.
    scratch
        Folder for a layer's graph.

    Raises
    ------
    BundleError
        If a prompt's numbers are not finite.
    """

    def __init__(
        self, checkpoint: Weights, config: QwenConfig, storage: Storage, *, spec: ReasonerSpec, states: list[State],
        scratch: Path,
    ) -> None:  # fmt: skip
        self._checkpoint, self._config, self._storage = checkpoint, config, storage
        self._spec, self._states, self._scratch = spec, states, scratch
        self._layer = -1
        self._moments: dict[str, Moments] = {}
        self._found: dict[str, Rounded] = {}

    def __call__(self, matrix: npt.NDArray[Any], name: str, bits: Bits) -> Rounded:
        """The matrix (rows, columns) of that name in the decoder's graph, in four bits."""
        layer = int(name.split(".")[1])
        while self._layer < layer:
            self._enter(self._layer + 1)
        if name not in self._found:
            self._found[name] = calibrated(matrix, name, self._moments[name])
        return self._found[name]

    def _enter(self, layer: int) -> None:
        """Send the prompts through the layer before, in four bits, and measure what this layer's matrices are given."""
        if layer:
            self._run(layer - 1, "int4", self._advance)
        self._layer, self._moments, self._found = layer, {}, {}
        self._run(layer, "fp32", self._measure)

    def _run(self, layer: int, precision: Precision, use: Callable[[Any, Mapping[str, str]], None]) -> None:
        ort = require("onnxruntime", extra="cpu", feature="Calibration")
        with tempfile.TemporaryDirectory(prefix="layer-", dir=self._scratch) as folder:
            path = Path(folder) / "layer.onnx"
            with weights_file(path, wanted=True) as outside:
                graph, multiplied = layer_graph(
                    self._checkpoint, self._config, layer, storage=self._storage, precision=precision,
                    outside=outside, rounding=self,
                )  # fmt: skip
            if use == self._measure:
                graph.graph.output.extend(onnx.ValueInfoProto(name=each) for each in sorted({*multiplied.values()}))
            save_graph(graph, path)
            options = ort.SessionOptions()
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # NumPy's turn between the runs
            use(ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]), multiplied)

    def _measure(self, session: Any, multiplied: Mapping[str, str]) -> None:
        names = sorted({*multiplied.values()})
        moments: dict[str, Moments] = {}
        for state in self._states:
            for name, rows in zip(names, session.run(names, self._inputs(state)), strict=True):
                if not np.isfinite(rows).all():
                    raise BundleError(f"layer {self._layer}: numbers that are not finite on a prompt to calibrate with")
                moments.setdefault(name, Moments(rows.shape[-1])).add(rows.reshape(-1, rows.shape[-1]))
        self._moments = {matrix: moments[tensor] for matrix, tensor in multiplied.items()}

    def _advance(self, session: Any, _multiplied: Mapping[str, str]) -> None:
        for state in self._states:
            (state.hidden,) = session.run([OUTPUT], self._inputs(state))

    def _inputs(self, state: State) -> dict[str, npt.NDArray[Any]]:
        spec = self._spec
        empty = np.zeros((1, spec.n_kv_heads, state.positions.shape[1], spec.head_dim), np.float32)
        caches = {f"past_{part}.{self._layer}": empty for part in ("key", "value")}
        return {**state.inputs(spec), **caches}
