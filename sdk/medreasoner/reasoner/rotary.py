"""Positions of a prompt on three axes (time, row, column) and the decoder's rotary tables."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["prompt_positions", "rotary_tables", "text_positions"]


def text_positions(first: int, count: int) -> NDArray[np.int64]:
    """(3, count) positions of text that starts at position `first`: equal on the three axes."""
    return np.broadcast_to(np.arange(first, first + count), (3, count))


def prompt_positions(ids: Sequence[int], image_token: int, rows: int, columns: int) -> tuple[NDArray[np.int64], int]:
    """Positions of a prompt with one image.

    Parameters
    ----------
    ids
        Token ids; the image's ``rows * columns`` tokens stand in one run, or are absent.
    image_token
        Id of the token that stands for a token of the image.
    rows, columns
        Of the image's tokens, after merging.

    Returns
    -------
    positions : (3, n) int64
        Time, row and column of each token. The image's tokens share one time; their rows and columns count from the
        position where the image starts.
    next_position : int
        Position of whatever follows: the largest so far plus one, which is less than the number of tokens.

    References
    ----------
    Qwen2.5-VL technical report (arXiv 2502.13923), section 2.1.3; Qwen2-VL (arXiv 2409.12191), figure 3.

    Examples
    --------
    >>> positions, after = prompt_positions([7, 9, 9, 9, 9, 7], image_token=9, rows=2, columns=2)
    >>> positions.tolist()
    [[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]]
    >>> after
    4
    """
    places = np.flatnonzero(np.asarray(ids) == image_token)
    if places.size == 0:
        return text_positions(0, len(ids)), len(ids)
    start, count = int(places[0]), places.size
    if count != rows * columns or int(places[-1]) != start + count - 1:
        raise ValueError(f"expected one run of {rows} x {columns} image tokens, got {count}")
    image = start + np.stack([np.zeros(count, np.int64), *np.divmod(np.arange(count), columns)])
    after = start + max(rows, columns)
    tail = len(ids) - start - count
    return np.concatenate([text_positions(0, start), image, text_positions(after, tail)], axis=1), after + tail


def rotary_tables(
    positions: NDArray[np.int64], *, head_dim: int, theta: float, sections: tuple[int, int, int]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines of each token's rotation, one row per token.

    Parameters
    ----------
    positions
        (3, n) int64 positions on the three axes.
    head_dim, theta
        Of the decoder: size of a head, and base of the frequencies.
    sections
        How many of the head_dim / 2 frequencies, from the fastest on, turn with time, row and column.

    Returns
    -------
    cos, sin : (n, head_dim / 2) float32
    """
    frequencies, axis = _frequencies(head_dim, theta, sections)
    angles = np.ascontiguousarray(positions[axis].T, np.float32) * frequencies  # (n, head_dim / 2)
    return np.cos(angles), np.sin(angles)


@lru_cache(maxsize=8)
def _frequencies(
    head_dim: int, theta: float, sections: tuple[int, int, int]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(head_dim / 2,) frequencies, and the axis that each follows."""
    frequencies = (1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)).astype(np.float32)
    return frequencies, np.repeat(np.arange(3), sections)
