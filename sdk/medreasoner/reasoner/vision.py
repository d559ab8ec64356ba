"""What the vision graph needs to know about a grid of patches: rotary tables and windows, worked out in NumPy.

Patches stay in merge order: the `merge` x `merge` patches of a block, which become one token, follow each other, and
the blocks go row by row.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from medreasoner import ops
from medreasoner.geometry import Placement
from medreasoner.spec import VisionSpec

__all__ = ["VisionGrid", "image_patches", "placed_grid", "vision_grid"]

_THETA = 10_000.0  # of Qwen2.5-VL's vision tower; not configurable there
_MASKED = np.float32(-1e9)


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionGrid:
    """Inputs of the vision graph that depend only on the size of the image.

    Parameters
    ----------
    rows, columns
        Of the tokens, after merging.
    rotary_cos, rotary_sin
        (n_patches, head_dim) float32.
    window_gather
        (n_windows, window_tokens) int64 patches of each window; 0 where a window at the edge has none.
    window_bias
        (n_windows, 1, 1, window_tokens) float32, 0 at a patch and -1e9 where there is none.
    window_scatter
        (n_patches,) int64 place of each patch in the flattened windows.
    """

    rows: int
    columns: int
    rotary_cos: NDArray[np.float32] = field(repr=False)
    rotary_sin: NDArray[np.float32] = field(repr=False)
    window_gather: NDArray[np.int64] = field(repr=False)
    window_bias: NDArray[np.float32] = field(repr=False)
    window_scatter: NDArray[np.int64] = field(repr=False)

    @property
    def n_tokens(self) -> int:
        """Tokens of the image in a prompt."""
        return self.rows * self.columns

    def inputs(self) -> dict[str, NDArray[np.float32] | NDArray[np.int64]]:
        """Graph inputs by name."""
        names = ("rotary_cos", "rotary_sin", "window_gather", "window_bias", "window_scatter")
        return {name: getattr(self, name) for name in names}


def image_patches(vision: VisionSpec, pixels: NDArray[np.uint8], placement: Placement) -> NDArray[np.float32]:
    """(n_patches, 3 * patch_size**2) float32 patches, in merge order, of pixels (H, W) or (H, W, 3) uint8."""
    return ops.preprocess_patches(
        pixels,
        placement.grid_height,
        placement.grid_width,
        content=(placement.content_height, placement.content_width),
        mean=vision.image_mean,
        std=vision.image_std,
        patch=vision.patch_size,
        merge=vision.merge_size,
    )


def placed_grid(vision: VisionSpec, placement: Placement) -> VisionGrid:
    """The vision graph's inputs for this size of grid."""
    return vision_grid(
        height=placement.grid_height,
        width=placement.grid_width,
        patch=vision.patch_size,
        merge=vision.merge_size,
        window=vision.window_size,
        head_dim=vision.head_dim,
    )


@lru_cache(maxsize=16)
def vision_grid(*, height: int, width: int, patch: int, merge: int, window: int, head_dim: int) -> VisionGrid:
    """Grid of an image.

    Parameters
    ----------
    height, width
        Of the image, pixels; multiples of ``patch * merge``.
    patch, window
        Side of a patch and of an attention window, pixels.
    merge
        Side of the block that becomes one token, patches; a window holds whole blocks.
    head_dim
        Of the vision tower.
    """
    rows, columns = height // patch, width // patch
    place = _merge_order(rows, columns, merge)  # (n_patches, 2)
    cos, sin = _rotary(place, head_dim)
    gather, is_patch = _windows(place, side=window // merge // patch * merge)
    scatter = np.empty(rows * columns, np.int64)
    scatter[gather[is_patch]] = np.flatnonzero(is_patch)
    return VisionGrid(
        rows=rows // merge,
        columns=columns // merge,
        rotary_cos=cos,
        rotary_sin=sin,
        window_gather=gather,
        window_bias=np.where(is_patch, np.float32(0), _MASKED)[:, None, None, :],
        window_scatter=scatter,
    )


def _merge_order(rows: int, columns: int, merge: int) -> NDArray[np.int64]:
    """(n_patches, 2) row and column of each patch."""
    place = np.stack(np.divmod(np.arange(rows * columns), columns), axis=-1)
    blocks = place.reshape(rows // merge, merge, columns // merge, merge, 2)
    return blocks.transpose(0, 2, 1, 3, 4).reshape(-1, 2)  # (block row, block column, row, column)


def _rotary(place: NDArray[np.int64], head_dim: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(n_patches, head_dim) tables: a quarter of the angles turn with the row, a quarter with the column, twice."""
    quarter = np.arange(0, head_dim // 2, 2, dtype=np.float32) / (head_dim // 2)
    frequencies = (1.0 / _THETA**quarter).astype(np.float32)
    angles = (place[:, :, None].astype(np.float32) * frequencies).reshape(len(place), -1)
    angles = np.concatenate([angles, angles], axis=-1)
    return np.cos(angles), np.sin(angles)


def _windows(place: NDArray[np.int64], side: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """(n_windows, window_tokens) patches of each window, and where there is one."""
    n_columns = int(place[:, 1].max()) // side + 1
    window = place[:, 0] // side * n_columns + place[:, 1] // side
    order = np.argsort(window, kind="stable")
    counts = np.bincount(window)
    # As wide as the fullest window: an image smaller than a window has fewer patches than its graph may index.
    gather = np.zeros((len(counts), int(counts.max())), np.int64)
    is_patch = np.arange(gather.shape[1]) < counts[:, None]
    gather[is_patch] = order
    return gather, is_patch
