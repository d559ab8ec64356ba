"""The vision tower without its graph, on processors that multiply bfloat16 (AVX512_BF16, Intel AMX) or bytes (VNNI).

A session spends half of a small tower's time between its products, and rounds one scale for a whole image where it
multiplies integers. Here an image goes from layer to layer in the cache, window by window, and rounding is that of
bfloat16, or of eight bits with a scale for every 64 numbers. The weights are those of the graph, in the file beside it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medreasoner import ops
from medreasoner.errors import BundleError
from medreasoner.kernel_session import ReadingSession, multiplies_integers, running
from medreasoner.kernel_spec import TowerSpec
from medreasoner.reasoner.stored import StoredTensor, check_size, stored_tensors
from medreasoner.reasoner.weights import STORED
from medreasoner.spec import VisionSpec

__all__ = ["TowerSession", "load_tower"]

_LAYER_MATRICES = ("qkv", "output", "gate", "up", "down")
_LAYER_VECTORS = ("norm", "qkv_bias", "output_bias", "mlp_norm", "gate_bias", "up_bias", "down_bias")


class TowerSession(ReadingSession[ops.VisionTower]):
    """A `Session` of the vision tower."""

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """``image_embeds`` (batch, n_tokens, hidden_dim) float32 of the graph's inputs.

        Raises
        ------
        ProviderError
            If they do not fit the weights.
        """
        is_patch = inputs["window_bias"][:, 0, 0, :] > -1
        starts = np.zeros(len(is_patch) + 1, np.int64)
        np.cumsum(is_patch.sum(axis=1), out=starts[1:])
        with running("the vision tower"):
            embeds = self._kernel.run(
                np.ascontiguousarray(inputs["patches"]),
                inputs["rotary_cos"],
                inputs["rotary_sin"],
                inputs["window_gather"][is_patch],
                starts,
                self._alone,
            )
        return {"image_embeds": embeds}


def load_tower(path: Path, tower: TowerSpec, vision: VisionSpec, *, out_dim: int, n_threads: int) -> TowerSession:
    """The weights as tiles, from the file beside the graph.

    Parameters
    ----------
    path
        The file: the matrix of the patches, the first norm, then the tensors layer by layer and those of the merger,
        each at a multiple of 4096 bytes.
    tower, vision, out_dim
        Element types and sizes, and the width of a token.
    n_threads
        That share an image.

    Raises
    ------
    BundleError
        If the file is not of these sizes, or they do not divide into tiles.
    """
    tensors = _tensors(tower, vision, out_dim)
    check_size(path, tower.file, tensors)
    packs = multiplies_integers(tower)
    content = np.memmap(path, np.uint8, mode="r")
    per_layer = (len(tensors) - 6) // tower.n_layers
    (patches, norm), rest = tensors[:2], tensors[2:]
    matrices, vectors = [], []
    for start in range(0, tower.n_layers * per_layer, per_layer):
        own = {each.name: each for each in rest[start : start + per_layer]}
        matrices.append([own[name].view(content) for name in _LAYER_MATRICES])
        own["norm"] = norm
        vectors.append([own[name].vector(content) for name in _LAYER_VECTORS])
        norm = own["next_norm"]
    first, first_bias, last, last_bias = rest[-4:]
    try:
        kernel = ops.VisionTower(
            tower.matrices,
            tower.patches,
            tower.n_heads,
            vision.merge_size**2,
            tower.rms_norm_eps,
            patches.view(content),
            matrices,
            vectors,
            [layer in vision.full_attention_layers for layer in range(tower.n_layers)],
            [first.view(content), last.view(content)],
            [each.vector(content) for each in (norm, first_bias, last_bias)],
            packs,
            n_threads,
        )
    except ValueError as err:
        raise BundleError(f"{tower.file}: {err}") from err
    return TowerSession(kernel, products="int8" if packs else "bfloat16")


def _tensors(tower: TowerSpec, vision: VisionSpec, out_dim: int) -> list[StoredTensor]:
    """All in their order; matrices are (in, out)."""
    hidden = tower.n_heads * vision.head_dim
    wide = hidden * vision.merge_size**2
    matrices, vectors = STORED[tower.matrices], STORED[tower.vectors]
    layer = [
        ("qkv", matrices, (hidden, 3 * hidden)),
        ("qkv_bias", vectors, (3 * hidden,)),
        ("output", matrices, (hidden, hidden)),
        ("mlp_norm", vectors, (hidden,)),
        ("output_bias", vectors, (hidden,)),
        ("gate", matrices, (hidden, tower.mlp_dim)),
        ("gate_bias", vectors, (tower.mlp_dim,)),
        ("up", matrices, (hidden, tower.mlp_dim)),
        ("up_bias", vectors, (tower.mlp_dim,)),
        ("down", matrices, (tower.mlp_dim, hidden)),
        ("next_norm", vectors, (hidden,)),
        ("down_bias", vectors, (hidden,)),
    ]
    return stored_tensors(
        [
            ("patches", STORED[tower.patches], (3 * vision.patch_size**2, hidden)),
            ("norm", vectors, (hidden,)),
            *tower.n_layers * layer,
            ("first", matrices, (wide, wide)),
            ("first_bias", vectors, (wide,)),
            ("last", matrices, (wide, out_dim)),
            ("last_bias", vectors, (out_dim,)),
        ]
    )
