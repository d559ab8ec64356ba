"""A few tokens through a small decoder without its graph: the step of every choice in an answer.

A session spends about as long between the operators of a small graph as in them. The weights are those of the graph, in
the file beside it; the key-value buffers are the session's own, so that both take turns on one sequence.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medreasoner import ops
from medreasoner.errors import BundleError
from medreasoner.reasoner.weights import STORED
from medreasoner.spec import ReasonerSpec, StepSpec

__all__ = ["StepKernel", "load_step", "steps_pay"]

_MOST_TOKENS = 32
_MOST_TOKENS_OF_INTEGERS = 256  # with instructions for them, which only AVX-512 has among the levels here

_LAYER_MATRICES = ("qkv", "output", "gate", "up", "down")
_ALIGNMENT = 4096  # of every tensor in the file


@dataclass(frozen=True, slots=True)
class StepKernel:
    """A decoder without its graph. `max_tokens` in a run: the graph, which splits its work, is as fast with more."""

    decoder: ops.DecoderStep
    max_tokens: int


def steps_pay() -> bool:
    """Whether a step is faster here than the graph: measured on AVX-512, written for AVX2 too."""
    return ops.simd_level() in ("avx2", "avx512")


def _most_tokens(step: StepSpec) -> int:
    has_integers = step.products == "int8" and ops.simd_level() == "avx512"
    return _MOST_TOKENS_OF_INTEGERS if has_integers else _MOST_TOKENS


def _layer_shapes(spec: ReasonerSpec, mlp_dim: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's tensors in the order of the file; matrices are (in, out)."""
    q, kv, hidden = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim, spec.hidden_dim
    return {
        "qkv": (hidden, q + 2 * kv),
        "qkv_bias": (q + 2 * kv,),
        "output": (q, hidden),
        "attention_norm": (hidden,),
        "gate": (hidden, mlp_dim),
        "up": (hidden, mlp_dim),
        "down": (mlp_dim, hidden),
        "next_norm": (hidden,),
    }


def load_step(path: Path, spec: ReasonerSpec, step: StepSpec) -> StepKernel:
    """The weights mapped from their file, or packed from it.

    Parameters
    ----------
    path
        The file: the norm before the first layer, then `_layer_shapes` layer by layer, each tensor at a multiple of
        4096 bytes.
    spec, step
        Sizes and element types.

    Raises
    ------
    BundleError
        If the file is not of these sizes.
    """
    tensors = list(_tensors(np.memmap(path, np.uint8, mode="r"), spec, step))
    (_, first_norm), rest = tensors[0], tensors[1:]
    per_layer = len(rest) // spec.n_layers
    matrices, vectors, norm = [], [], first_norm
    for start in range(0, len(rest), per_layer):
        layer = dict(rest[start : start + per_layer])
        matrices.append([layer[name] for name in _LAYER_MATRICES])
        vectors.append([norm, layer["qkv_bias"], layer["attention_norm"]])
        norm = layer["next_norm"]
    try:
        decoder = ops.DecoderStep(
            step.matrices,
            spec.n_heads,
            spec.n_kv_heads,
            step.rms_norm_eps,
            matrices,
            vectors,
            final_norm=norm,
            pack=step.products == "int8",
        )
    except ValueError as err:
        raise BundleError(f"{step.file}: {err}") from err
    return StepKernel(decoder, _most_tokens(step))


def _tensors(content: NDArray[np.uint8], spec: ReasonerSpec, step: StepSpec) -> Iterator[tuple[str, NDArray[Any]]]:
    """The tensors in their order; vectors as float32, bfloat16 as its bit patterns."""
    shapes = [("norm", (spec.hidden_dim,)), *spec.n_layers * list(_layer_shapes(spec, step.mlp_dim).items())]
    end = 0
    for name, shape in shapes:
        dtype = np.dtype(STORED[step.matrices if len(shape) == 2 else step.vectors])
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = start + int(np.prod(shape)) * dtype.itemsize
        if end > content.size:
            raise BundleError(f"{step.file}: {content.size} bytes are fewer than its decoder has; export it again")
        tensor = content[start:end].view(dtype).reshape(shape)
        yield name, tensor if len(shape) == 2 else tensor.astype(np.float32)
    if end != content.size:
        raise BundleError(f"{step.file}: {content.size} bytes, expected {end}; export it again")
