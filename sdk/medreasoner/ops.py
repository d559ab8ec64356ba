"""The compiled kernels, typed and checked: the one door to `medreasoner._kernels`.

All functions on arrays release the interpreter lock while they work, start no threads unless told how many, and never
change their arguments (a step of the grammar, or a piece of text for the parser, is shorter than letting go of the lock
and taking it). Arrays must have the stated shape and dtype and be C-contiguous, numbers lie in the stated range: all
else raises `ArrayError`, nothing is copied behind the caller's back. Sizes go up to 2**28 pixels.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from medreasoner import _kernels
from medreasoner._array_checks import (
    check_array,
    check_canvas,
    check_hidden,
    check_mask,
    check_pixels,
    check_size,
    check_weight,
)
from medreasoner._decoder_ops import WeightDtype, absent_share, decoder_step, draw_token, write_answers
from medreasoner._kernels import (
    AnswerGrammar,
    AnswerParser,
    AnswerState,
    AnswerWriting,
    DecoderSequence,
    DecoderStep,
    ImageEncoder,
    Interrupt,
    ParsedAnswer,
    PromptDecoder,
    VisionTower,
    cpu_features,
    distances,
    has_tiles,
    simd_level,
    tile_road,
)
from medreasoner.errors import ArrayError

__all__ = [
    "AnswerGrammar",
    "AnswerParser",
    "AnswerState",
    "AnswerWriting",
    "DecoderSequence",
    "DecoderStep",
    "ImageEncoder",
    "Interrupt",
    "ParsedAnswer",
    "PromptDecoder",
    "Rle",
    "VisionTower",
    "VoiFunction",
    "WeightDtype",
    "absent_share",
    "count_masks",
    "cpu_features",
    "decoder_step",
    "distances",
    "draw_token",
    "gather_rows",
    "has_tiles",
    "mask_box",
    "mask_from_logits",
    "preprocess_patches",
    "preprocess_planes",
    "project_rows",
    "resize_u8",
    "rle_decode",
    "rle_encode",
    "select_token",
    "simd_level",
    "tile_road",
    "window_u8",
    "write_answers",
]

VoiFunction = Literal["LINEAR", "LINEAR_EXACT", "SIGMOID"]
"""VOI LUT Function (0028,1056)."""

_I32, _I64, _F32 = np.dtype(np.int32), np.dtype(np.int64), np.dtype(np.float32)
_STORED = (np.dtype(np.int16), np.dtype(np.uint16), _I32, _F32)


class Rle(TypedDict):
    """A mask as COCO's compressed run lengths, in column-major order."""

    size: list[int]
    """Height and width, pixels."""
    counts: str


def resize_u8(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Resize by antialiased bicubic interpolation, bit for bit as Pillow's ``Image.resize(BICUBIC)``.

    Parameters
    ----------
    pixels
        (H, W) or (H, W, 3) uint8.
    height, width
        Size of the result, pixels; all else is as in `pixels`.

    Notes
    -----
    Keys' cubic with a = -0.5, stretched by the scale where the image shrinks; weights in 22-bit fixed point, each pass
    rounded to 8 bits. The horizontal pass comes first unless the height shrinks by more than twice as many pixels as
    the width: the order of Pillow 13. Older versions always go horizontally first, a rounding apart.

    References
    ----------
    R. Keys, "Cubic convolution interpolation for digital image processing", 1981, equation 8.

    Examples
    --------
    >>> resize_u8(np.array([[0, 255]], np.uint8), 1, 4).tolist()
    [[0, 53, 202, 255]]
    """
    check_pixels(pixels)
    check_size(height, width)
    return _kernels.resize_u8(pixels, height, width)


def preprocess_patches(
    pixels: NDArray[np.uint8],
    height: int,
    width: int,
    *,
    content: tuple[int, int] | None = None,
    mean: Sequence[float],
    std: Sequence[float],
    patch: int,
    merge: int,
) -> NDArray[np.float32]:
    """Resize, pad, normalise and cut an image into the patches of a Qwen2.5-VL vision tower, in one pass.

    Parameters
    ----------
    pixels
        (H, W) or (H, W, 3) uint8; grey is repeated to three channels.
    height, width
        Size of the padded image, pixels; multiples of ``patch * merge``.
    content
        Height and width of the resized image, at the top left of the padded one; None for all of it. The padding is
        black before normalising.
    mean, std
        Of the three channels, on the scale 0 to 1.
    patch, merge
        Side of a patch, pixels, and of the block that the tower merges into one token, patches.

    Returns
    -------
    NDArray[np.float32]
        (n_patches, 3 * patch * patch) float32. Patches are ordered (block row, block column, row in block, column in
        block), the numbers in a patch (channel, y, x). The temporal axis is not repeated: the exported graph has its
        two slices summed.
    """
    check_pixels(pixels)
    check_canvas(height, width, content, mean, std)
    if patch < 1 or merge < 1 or height % (patch * merge) or width % (patch * merge):
        raise ArrayError(f"size: expected multiples of {patch} x {merge} pixels, got {height} x {width}")
    return _kernels.preprocess_patches(
        pixels, height, width, content=content, mean=mean, std=std, patch=patch, merge=merge
    )


def preprocess_planes(
    pixels: NDArray[np.uint8],
    height: int,
    width: int,
    *,
    content: tuple[int, int] | None = None,
    mean: Sequence[float],
    std: Sequence[float],
) -> NDArray[np.float32]:
    """Resize, normalise and pad an image for a SAM image encoder.

    Parameters
    ----------
    pixels, height, width, content, mean, std
        As in `preprocess_patches`, but for the padding: 0 after normalising.

    Returns
    -------
    NDArray[np.float32]
        (3, height, width) float32.
    """
    check_pixels(pixels)
    check_canvas(height, width, content, mean, std)
    return _kernels.preprocess_planes(pixels, height, width, content=content, mean=mean, std=std)


def window_u8(
    values: NDArray[np.int16] | NDArray[np.uint16] | NDArray[np.int32] | NDArray[np.float32],
    slope: float,
    intercept: float,
    center: float,
    width: float,
    *,
    function: VoiFunction = "LINEAR",
    invert: bool = False,
) -> NDArray[np.uint8]:
    """Rescale stored values and apply a DICOM window, to 8 bits.

    Parameters
    ----------
    values
        (H, W) int16, uint16, int32 or float32 stored values.
    slope, intercept
        Rescale Slope (0028,1053) and Intercept (0028,1052).
    center, width
        Window Center (0028,1050) and Width (0028,1051), in rescaled units; width at least 1 (LINEAR) or above 0.
    function
        VOI LUT Function (0028,1056).
    invert
        True for MONOCHROME1, where the lowest value is white.

    Returns
    -------
    NDArray[np.uint8]
        (H, W) uint8, rounded to the nearest. NaN becomes 0.

    References
    ----------
    DICOM PS3.3 C.11.1.1.2, C.11.2.1.2.1 and C.11.2.1.3.

    Examples
    --------
    >>> window_u8(np.array([[-160, 40, 240]], np.int16), 1, 0, 40, 400).tolist()
    [[0, 128, 255]]
    """
    check_array(values, "values", "(H, W)", 2, *_STORED)
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise ArrayError(f"VOI LUT Function (0028,1056): expected LINEAR, LINEAR_EXACT or SIGMOID, got {function!r}")
    if not np.isfinite((slope, intercept, center, width)).all():
        raise ArrayError(f"window: expected finite numbers, got {slope}, {intercept}, {center}, {width}")
    if not (width >= 1 if function == "LINEAR" else width > 0):
        least = "at least 1" if function == "LINEAR" else "above 0"
        raise ArrayError(f"Window Width (0028,1051): expected {least} for {function}, got {width}")
    return _kernels.window_u8(values, slope, intercept, center, width, function=function, invert=invert)


def select_token(
    hidden: NDArray[np.float32], weight: NDArray[Any], dtype: WeightDtype, rows: NDArray[np.int32]
) -> tuple[int, float]:
    """Choose the likeliest of a few tokens without computing the other logits.

    Parameters
    ----------
    hidden
        (D,) float32 last hidden state, after the final norm.
    weight
        (V, D) matrix of the language head.
    dtype
        Element type of `weight`.
    rows
        (K,) int32 token ids to choose from, at least one.

    Returns
    -------
    tuple[int, float]
        The token id with the largest logit (the first in `rows` among equals) and its log-probability among `rows`.
        A logit that is not finite raises `ArrayError`.

    Examples
    --------
    >>> weight = np.array([[9, 9], [1, 0], [0, 1]], np.float32)
    >>> token, logprob = select_token(np.array([0, 2], np.float32), weight, "float32", np.array([1, 2], np.int32))
    >>> token, round(logprob, 3)
    (2, -0.127)
    """
    check_weight(weight, dtype)
    check_hidden(hidden, weight)
    check_array(rows, "rows", "(K,)", 1, _I32)
    if rows.size == 0:
        raise ArrayError("rows: expected at least one token, got none")
    try:
        return _kernels.select_token(hidden, weight, dtype, rows)
    except ValueError as err:  # a row outside the matrix, or logits that are not finite
        raise ArrayError(f"select_token: {err}") from err


def project_rows(
    hidden: NDArray[np.float32],
    weight: NDArray[Any],
    dtype: WeightDtype,
    rows: NDArray[np.int32] | None = None,
    *,
    n_threads: int = 1,
) -> NDArray[np.float32]:
    """Compute the logits of some tokens, or of all.

    Parameters
    ----------
    hidden, weight, dtype
        As in `select_token`; 16-bit elements are widened on the fly, sums are float32.
    rows
        (K,) int32 token ids; None for all V.
    n_threads
        That share the rows of a large matrix.

    Returns
    -------
    NDArray[np.float32]
        (K,) or (V,) float32.
    """
    check_weight(weight, dtype)
    check_hidden(hidden, weight)
    if rows is not None:
        check_array(rows, "rows", "(K,)", 1, _I32)
    try:
        return _kernels.project_rows(hidden, weight, dtype, rows, n_threads)
    except ValueError as err:  # a row outside the matrix
        raise ArrayError(f"rows: {err}") from err


def gather_rows(weight: NDArray[Any], dtype: WeightDtype, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Look token embeddings up.

    Parameters
    ----------
    weight, dtype
        (V, D) embedding matrix and its element type.
    ids
        (...) int64 token ids, of any shape.

    Returns
    -------
    NDArray[np.float32]
        (..., D) float32.
    """
    check_weight(weight, dtype)
    check_array(ids, "ids", "(...)", np.ndim(ids), _I64)
    try:
        return _kernels.gather_rows(weight, dtype, ids)
    except ValueError as err:  # an id outside the matrix
        raise ArrayError(f"ids: {err}") from err


def _check_crop(crop: tuple[float, float], shape: tuple[int, ...]) -> None:
    if not (0 < crop[0] <= shape[0] and 0 < crop[1] <= shape[1]):
        raise ArrayError(f"crop: expected a size within {shape}, got {crop}")


def mask_from_logits(
    logits: NDArray[np.float32], *, crop: tuple[float, float], height: int, width: int, threshold: float = 0.0
) -> NDArray[np.bool_]:
    """Enlarge a segmenter's mask logits to the image's grid and compare them with a threshold, in one pass.

    Parameters
    ----------
    logits
        (h, w) float32.
    crop
        Height and width of the part of `logits` that the image covers, from the top left, in logits; may be fractional.
    height, width
        Size of the mask, pixels.
    threshold
        A pixel is set where its interpolated logit is greater.

    Returns
    -------
    NDArray[np.bool_]
        (height, width) bool. Where NaN takes part, False.

    Notes
    -----
    Bilinear with half-pixel centres and repeated edges, as ``torch.nn.functional.interpolate(align_corners=False)`` of
    the cropped logits. Between four logits on the same side of the threshold nothing is interpolated.

    Examples
    --------
    >>> mask_from_logits(np.array([[-1, 3]], np.float32), crop=(1, 2), height=1, width=4).tolist()
    [[False, False, True, True]]
    """
    check_array(logits, "logits", "(h, w)", 2, _F32)
    check_size(height, width)
    _check_crop(crop, logits.shape)
    return _kernels.mask_from_logits(logits, crop=crop, height=height, width=width, threshold=threshold)


def count_masks(
    logits: NDArray[np.float32],
    *,
    crop: tuple[float, float],
    height: int,
    width: int,
    threshold: float = 0.0,
    n_threads: int = 1,
) -> NDArray[np.uint8]:
    """Count in how many of several masks each pixel is set: the sum of `mask_from_logits` over them, in one pass.

    Parameters
    ----------
    logits
        (n, h, w) float32, n up to 255.
    crop, height, width, threshold
        As in `mask_from_logits`, the same for all.
    n_threads
        That share the rows of large masks.

    Returns
    -------
    NDArray[np.uint8]
        (height, width) uint8.

    Examples
    --------
    >>> count_masks(np.array([[[-1, 3]], [[2, 2]]], np.float32), crop=(1, 2), height=1, width=4).tolist()
    [[1, 1, 2, 2]]
    """
    check_array(logits, "logits", "(n, h, w)", 3, _F32)
    check_size(height, width)
    _check_crop(crop, logits.shape[1:])
    try:
        return _kernels.count_masks(
            logits, crop=crop, height=height, width=width, threshold=threshold, n_threads=n_threads
        )
    except ValueError as err:  # too many
        raise ArrayError(str(err)) from err


def mask_box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int] | None:
    """Return the smallest box [x1, y1, x2, y2), half-open, around the set pixels of a mask (H, W); None without any.

    Examples
    --------
    >>> mask_box(np.array([[0, 0, 0], [0, 1, 1]], bool))
    (1, 1, 3, 2)
    """
    check_mask(mask)
    box = _kernels.mask_box(mask)
    return None if box is None else (box[0], box[1], box[2], box[3])


def rle_encode(mask: NDArray[np.bool_]) -> Rle:
    """Return a mask (H, W) as COCO's compressed run lengths, equal to pycocotools'.

    Examples
    --------
    >>> rle_encode(np.array([[0, 0, 0], [0, 1, 1]], bool))
    {'size': [2, 3], 'counts': '3110'}
    """
    check_mask(mask)
    return {"size": [mask.shape[0], mask.shape[1]], "counts": _kernels.rle_encode(mask)}


def rle_decode(rle: Rle) -> NDArray[np.bool_]:
    """Return the (H, W) bool mask of COCO's compressed run lengths.

    Parameters
    ----------
    rle
        ``size`` [H, W] in pixels and ``counts`` as text.

    Raises
    ------
    ArrayError
        If the RLE is malformed, or its runs do not sum to H x W.

    Examples
    --------
    >>> rle_decode({"size": [2, 3], "counts": "3110"}).astype(int).tolist()
    [[0, 0, 0], [0, 1, 1]]
    """
    try:
        height, width = rle["size"]
        counts = rle["counts"]
    except (KeyError, TypeError, ValueError) as err:
        raise ArrayError("RLE: expected a mapping with 'size' [height, width] and 'counts'") from err
    if not (isinstance(height, int) and isinstance(width, int) and isinstance(counts, str) and counts.isascii()):
        raise ArrayError("RLE: expected two integers in 'size' and ASCII text in 'counts'")
    check_size(height, width)
    try:
        return _kernels.rle_decode(counts, height, width)
    except ValueError as err:
        raise ArrayError(str(err)) from err
