"""Tokens through a decoder without its graph: the step of every choice in an answer.

A session spends about as long between the operators of a small graph as in them, and reads the four-bit weights of a
large one at half of the memory's speed. The weights are those of the graph, in the file beside it. The key-value
buffers of a small one are the session's own, so that both take turns on one sequence; in four bits the kernel runs
prompts too, and the graph need not be opened at all.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medreasoner import ops
from medreasoner.errors import BundleError
from medreasoner.kernel_session import KernelSession
from medreasoner.kernel_spec import StepSpec
from medreasoner.reasoner.stored import StoredTensor, check_size, stored_tensors
from medreasoner.reasoner.weights import STORED
from medreasoner.spec import ReasonerSpec

__all__ = ["NoGraph", "StepKernel", "load_step", "needs_no_graph", "no_graph", "steps_pay"]

_MOST_TOKENS = 32

_LAYER_MATRICES = ("qkv", "output", "gate", "up", "down")
_BLOCK = 32  # numbers of a row that share a scale in four bits


@dataclass(frozen=True, slots=True)
class StepKernel:
    """A decoder without its graph. `max_tokens` in a run: the graph, which splits its work, is as fast with more."""

    decoder: ops.DecoderStep
    max_tokens: int


class NoGraph(KernelSession):
    """A `Session` for a decoder that a kernel runs: it has buffers of a type, and nothing to run."""

    def __init__(self, dtype: type[np.generic]) -> None:
        self._dtype = dtype

    def element_type(self, name: str) -> type[np.generic]:
        """Of keys and values."""
        return self._dtype


def steps_pay() -> bool:
    """Whether a step is faster here than the graph: measured on AVX-512, written for AVX2 too."""
    return ops.simd_level() in ("avx2", "avx512")


def needs_no_graph(step: StepSpec | None) -> bool:
    """Whether a kernel runs prompts and steps here, and faster than the graph."""
    if step is None or not steps_pay():
        return False
    return step.matrices == "int4" or (step.products == "int8" and ops.simd_level() == "avx512")


def no_graph(step: StepSpec) -> NoGraph:
    """In the place of the session of a decoder that needs none; keys and values are as the graph has them."""
    return NoGraph(np.float16 if step.vectors == "float16" else np.float32)


def load_step(path: Path, spec: ReasonerSpec, step: StepSpec, *, n_threads: int = 1) -> StepKernel:
    """The weights mapped from their file, or packed from it.

    Parameters
    ----------
    path
        The file: the norm before the first layer, then the tensors layer by layer, each at a multiple of 4096 bytes.
    spec, step
        Sizes and element types.
    n_threads
        That share each step.

    Raises
    ------
    BundleError
        If the file is not of these sizes.
    """
    tensors = _tensors(spec, step)
    check_size(path, step.file, tensors)
    per_layer = (len(tensors) - 1) // spec.n_layers
    layers = [tensors[start : start + per_layer] for start in range(1, len(tensors), per_layer)]
    content = np.memmap(path, np.uint8, mode="r")
    vectors, norm = [], tensors[0].vector(content)
    for layer in layers:
        own = {each.name: each.vector(content) for each in layer if each.is_vector}
        vectors.append([norm, own["qkv_bias"], own["attention_norm"]])
        norm = own["next_norm"]
    try:
        decoder = ops.DecoderStep(
            step.matrices,
            spec.n_heads,
            spec.n_kv_heads,
            step.rms_norm_eps,
            _matrices(path, layers),
            vectors,
            final_norm=norm,
            pack=step.products == "int8",
            n_threads=n_threads,
        )
    except ValueError as err:
        raise BundleError(f"{step.file}: {err}") from err
    return StepKernel(decoder, _most_tokens(spec, step))


def _most_tokens(spec: ReasonerSpec, step: StepSpec) -> int:
    if needs_no_graph(step):
        return spec.max_length
    return _MOST_TOKENS


def _tensors(spec: ReasonerSpec, step: StepSpec) -> list[StoredTensor]:
    """All in their order; bfloat16 is read as its bit patterns."""
    weights = [("norm", (spec.hidden_dim,)), *spec.n_layers * list(_layer_shapes(spec, step.mlp_dim).items())]
    return stored_tensors(part for name, shape in weights for part in _parts(name, shape, step))


def _layer_shapes(spec: ReasonerSpec, mlp_dim: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's weights in the order of the file; matrices are (in, out)."""
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


def _parts(name: str, shape: tuple[int, ...], step: StepSpec) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, type and shape of the tensors that a weight is stored as."""
    if len(shape) == 1:
        return [(name, STORED[step.vectors], shape)]
    if step.matrices != "int4":
        return [(name, STORED[step.matrices], shape)]
    rows, columns = shape
    blocks = rows // _BLOCK
    return [
        (f"{name}.levels", "u1", (columns, blocks, _BLOCK // 2)),
        (f"{name}.scales", "<f4", (columns, blocks)),
        (f"{name}.zeros", "u1", (columns, -(-blocks // 2))),
    ]


def _matrices(path: Path, layers: list[list[StoredTensor]]) -> Iterator[list[NDArray[Any]]]:
    """Those of each layer; mapped anew, so that what was packed of one need not stay in memory."""
    for layer in layers:
        content = np.memmap(path, np.uint8, mode="r")
        by_name = [(each.name.partition(".")[0], each) for each in layer if not each.is_vector]
        yield [each.view(content) for name in _LAYER_MATRICES for own, each in by_name if own == name]
