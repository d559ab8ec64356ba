"""SAM's image encoder without its graph, on processors that multiply bfloat16 (AVX512_BF16, Intel AMX) or bytes.

Of SAM's own size the graph's products are of float32; here they are of bfloat16, or those of the layers in eight bits
with a scale for every 64 numbers (VNNI); norms, relative positions and softmax stay float32. The weights are those of
the graph, in the file beside it.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medreasoner import ops
from medreasoner._text import one_line
from medreasoner.errors import BundleError
from medreasoner.kernel_session import ReadingSession, multiplies_integers, running
from medreasoner.kernel_spec import ImageTowerSpec, WeightDtype
from medreasoner.reasoner.stored import check_size, stored_tensors
from medreasoner.reasoner.weights import STORED
from medreasoner.spec import SegmenterSpec

__all__ = ["ImageTowerSession", "load_image_tower"]

_COLOURS = 3


class ImageTowerSession(ReadingSession[ops.ImageEncoder]):
    """A `Session` of the image encoder."""

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """``image_embedding`` (batch, channels, grid, grid) float32 of ``pixel_values``.

        Raises
        ------
        ProviderError
            If they do not fit the weights.
        """
        with running("the image encoder"):
            embedding = self._kernel.run(np.ascontiguousarray(inputs["pixel_values"]), self._alone)
        return {"image_embedding": embedding}


def load_image_tower(path: Path, spec: SegmenterSpec, tower: ImageTowerSpec, *, n_threads: int) -> ImageTowerSession:
    """The weights as tiles, from the file beside the graph.

    Parameters
    ----------
    path
        The file: tensors in the order of the graph, each at a multiple of 4096 bytes.
    spec, tower
        Sizes and element types.
    n_threads
        That share an image.

    Raises
    ------
    BundleError
        If the file is not of these sizes, or they do not divide into tiles.
    """
    grid = spec.mask_size // 4
    windows = [grid if layer in tower.global_layers else tower.window_size for layer in range(tower.n_layers)]
    types = {True: STORED[tower.matrices], False: STORED[tower.vectors]}
    tensors = stored_tensors((name, types[len(shape) > 1], shape) for name, shape in _weights(tower, windows, grid))
    check_size(path, tower.file, tensors)
    packs = multiplies_integers(tower)
    content = np.memmap(path, np.uint8, mode="r")
    weights = {each.name: each.vector(content) if each.is_vector else each.view(content) for each in tensors}
    try:
        kernel = ops.ImageEncoder(
            tower.matrices,
            _as_matrices(weights, windows, tower.matrices),
            tower.n_heads,
            tower.patch_size,
            grid,
            windows,
            tower.norm_eps,
            packs,
            n_threads,
        )
    except ValueError as err:
        raise BundleError(f"{tower.file}: {one_line(err)}") from err
    return ImageTowerSession(kernel, products="int8" if packs else "bfloat16")


def _weights(t: ImageTowerSpec, windows: list[int], grid: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of all in their order; matrices are (in, out)."""
    d, head = t.hidden_dim, t.hidden_dim // t.n_heads
    yield "patches", (d, _COLOURS, t.patch_size, t.patch_size)
    yield "patches.bias", (d,)
    yield "places", (1, grid * grid, d)
    yield from _norm("0.attention_norm", d)
    for index, window in enumerate(windows):
        layer = f"{index}."
        yield layer + "qkv", (d, 3 * d)
        yield layer + "qkv.bias", (3 * d,)
        yield layer + "rows", (window, head, window)
        yield layer + "columns", (window, head, window)
        yield layer + "output", (d, d)
        yield from _norm(layer + "mlp_norm", d)
        yield layer + "output.bias", (d,)
        yield layer + "up", (d, t.mlp_dim)
        yield layer + "up.bias", (t.mlp_dim,)
        yield layer + "down", (t.mlp_dim, d)
        if index + 1 < t.n_layers:
            yield from _norm(f"{index + 1}.attention_norm", d)
        yield layer + "down.bias", (d,)
    yield "narrow", (d, t.n_channels)
    yield from _norm("narrow_norm", t.n_channels)
    yield "neighbours", (t.n_channels, t.n_channels, 3, 3)
    yield from _norm("last_norm", t.n_channels)


def _norm(name: str, size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.scale", (size,)
    yield f"{name}.bias", (size,)


def _as_matrices(weights: dict[str, NDArray[Any]], windows: list[int], dtype: WeightDtype) -> dict[str, NDArray[Any]]:
    """Kernels and tables as the matrices that they multiply with."""
    patches, neighbours = weights.pop("patches"), weights.pop("neighbours")
    weights["patches"] = np.ascontiguousarray(patches.reshape(len(patches), -1).T)
    for index in range(9):
        weights[f"neighbour.{index}"] = np.ascontiguousarray(neighbours[:, :, index // 3, index % 3].T)
    (places,) = weights["places"]
    weights["places"] = ops.gather_rows(places, dtype, np.arange(len(places)))
    for index, window in enumerate(windows):
        tables = [_by_distance(weights.pop(f"{index}.{axis}"), window) for axis in ("rows", "columns")]
        weights[f"{index}.offsets"] = np.concatenate(tables, axis=1)
    return weights


def _by_distance(table: NDArray[Any], window: int) -> NDArray[Any]:
    """Of (query place, head, key place) the columns (head, distances): of a key that is j - window + 1 behind."""
    before, behind = table[:0:-1, :, 0], table[0].T  # the query at the other end; the query first
    found = np.zeros((table.shape[1], ops.distances(window)), table.dtype)
    found[:, : 2 * window - 1] = np.concatenate([before, behind]).T
    return found
