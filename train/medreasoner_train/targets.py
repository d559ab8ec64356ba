"""What a mask asks the reasoner to say: its box and two points inside it.

The data have masks only. The two points are the centres of the two largest inscribed discs, the second after the first
is removed (design, section 3); geometry is scaled to the paper's 840-pixel grid first.
"""

import numpy as np
import numpy.typing as npt
from scipy import ndimage

__all__ = ["box_of", "depth_at", "inscribed_points"]

GRID = 840.0  # the paper's image side: all of its pixel thresholds belong to it
APART = 10.0


def box_of(mask: npt.NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """Half-open box (x1, y1, x2, y2) of a non-empty (H, W) mask, in its own pixels.

    >>> m = np.zeros((4, 6), bool); m[1:3, 2:5] = True
    >>> box_of(m)
    (2.0, 1.0, 5.0, 3.0)
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def depth_at(mask: npt.NDArray[np.bool_], points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(N,) distance of each point (N, 2) of x, y from the nearest place outside a (H, W) mask, in pixels, 0 outside.

    >>> m = np.zeros((9, 9), bool); m[2:7, 2:7] = True
    >>> depth_at(m, np.array([[4.5, 4.5], [0.5, 0.5]])).tolist()
    [3.0, 0.0]
    """
    depth: npt.NDArray[np.float64] = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    columns, rows = np.clip(points.astype(np.int64), 0, np.array(mask.shape[::-1]) - 1).T
    found: npt.NDArray[np.float64] = depth[rows, columns]
    return found


def inscribed_points(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Centres of the two largest inscribed discs.

    Parameters
    ----------
    mask : (H, W) bool
        Not empty.

    Returns
    -------
    points : (2, 2) float64
        (x, y) in the mask's pixels, centre of a pixel at + 0.5; both inside the mask and, where the mask is large
        enough, more than 10 px apart on the 840-px grid. Ordered along the axis on which they lie further apart, so
        that two discs of nearly equal size do not swap from image to image.
    """
    height, width = mask.shape
    scale = np.array([GRID / height, GRID / width])
    padded = np.pad(mask, 1)  # a disc does not reach beyond the image
    depth = ndimage.distance_transform_edt(padded, sampling=scale)[1:-1, 1:-1]
    first = np.array(np.unravel_index(int(depth.argmax()), mask.shape))
    radius = float(depth[tuple(first)])
    rows, columns = np.ogrid[:height, :width]
    distance = np.hypot((rows - first[0]) * scale[0], (columns - first[1]) * scale[1])
    rest = mask & (distance > max(radius, APART))
    if rest.any():
        left = ndimage.distance_transform_edt(np.pad(rest, 1), sampling=scale)[1:-1, 1:-1]
        second = np.array(np.unravel_index(int(left.argmax()), mask.shape))
    else:  # nothing of the mask lies outside the disc: the pixel furthest from its centre
        second = np.array(np.unravel_index(int(np.where(mask, distance, -1.0).argmax()), mask.shape))
    points = np.array([[first[1], first[0]], [second[1], second[0]]], dtype=np.float64) + 0.5
    spread = np.abs(points[0] - points[1]) * scale[::-1]
    return points[np.argsort(points[:, int(spread.argmax())], kind="stable")]
