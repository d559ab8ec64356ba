import gzip
import io
import itertools
import tracemalloc

import nibabel
import numpy as np
import pytest
from nibabel.orientations import apply_orientation, io_orientation

from medreasoner.errors import ImageReadError, MissingExtraError, OutputError
from medreasoner.image import read_image

SHAPE = (11, 13, 9)


def _bytes(data, affine, *, kind=nibabel.Nifti1Image, unit="mm", packed=False):
    image = kind(data, affine)
    image.header.set_xyzt_units(unit)
    return gzip.compress(image.to_bytes()) if packed else image.to_bytes()


def _affines():
    """All 48 axis orders and directions, with unequal voxel sizes."""
    sizes = (0.7, 1.1, 2.5)
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            affine = np.eye(4)
            affine[:3, :3] = 0
            for stored, world in enumerate(order):
                affine[world, stored] = signs[stored] * sizes[stored]
            affine[:3, 3] = (3, -5, 7)
            yield pytest.param(
                affine, id="".join("-+"[sign > 0] + "xyz"[world] for world, sign in zip(order, signs, strict=True))
            )


OBLIQUE = np.array([[0.69, -0.1, 0.2, 4], [0.11, 1.08, -0.3, -9], [-0.05, 0.21, 2.4, 1], [0, 0, 0, 1.0]])


@pytest.fixture(scope="module")
def volume():
    return np.random.default_rng(0).integers(0, 1000, SHAPE, dtype=np.int16)


def _radiological(volume, affine, index):
    """By nibabel: canonical RAS, then the patient's right on the left and the front up."""
    canonical = apply_orientation(volume, io_orientation(affine))
    return canonical[::-1, ::-1, index].T


@pytest.mark.parametrize("affine", [*_affines(), pytest.param(OBLIQUE, id="oblique")])
@pytest.mark.parametrize("packed", [False, True], ids=["nii", "nii.gz"])
def test_slices_are_radiological_for_every_storage_order_and_masks_go_back(volume, affine, packed):
    data = _bytes(volume, affine, packed=packed)
    n_slices = apply_orientation(volume, io_orientation(affine)).shape[2]
    for index in (0, 4, n_slices - 1):
        image = read_image(data, frame=index)
        reference = _radiological(volume, affine, index).astype(float)
        low, high = np.percentile(reference, [0.5, 99.5])
        expected = np.floor(np.clip((reference - low) / (high - low), 0, 1) * 255 + 0.5)
        assert np.abs(image.pixels - expected).max() <= 1
        assert (image.frame, image.n_frames) == (index, n_slices)

        mask = np.zeros(image.pixels.shape, np.uint8)
        mask[1, 2], mask[0, -1], mask[2:4, 5] = 7, 8, 9  # no symmetry
        back = image.nifti.mask_to_volume(mask)
        assert (back.shape, back.dtype) == (SHAPE, np.uint8)
        np.testing.assert_array_equal(_radiological(back, affine, index), mask)
        assert back.astype(int).sum() == mask.astype(int).sum()


def test_a_marker_in_the_patients_right_front_is_at_the_top_left():
    """Checked in world coordinates, without nibabel's orientations."""
    affine = np.diag([-2.0, 3.0, 4.0, 1.0])  # stored right to left
    affine[:3, 3] = (20, -15, 0)
    volume = np.zeros((21, 11, 9), np.int16)
    world = np.array([[affine @ (i, j, k, 1) for k in range(9)] for i in range(21) for j in range(11)]).reshape(
        21, 11, 9, 4
    )
    volume[(world[..., 0] > 14) & (world[..., 1] > 6)] = 100  # RAS: x to the right, y to the front
    image = read_image(_bytes(volume, affine), frame=3)
    assert image.pixels.shape == (11, 21)
    assert image.pixels[0, 0] == 255
    assert image.pixels[-1, 0] == image.pixels[0, -1] == image.pixels[-1, -1] == 0
    assert image.pixel_spacing_mm == (3, 2)


def test_slices_count_from_the_feet_up(volume):
    for sign in (1, -1):
        affine = np.diag([1.0, 1.0, sign, 1.0])
        lowest = volume[:, :, 0 if sign > 0 else -1]
        image = read_image(_bytes(volume, affine), frame=0)
        np.testing.assert_array_equal(image.pixels.argmax(), lowest[::-1, ::-1].T.argmax())
        assert image.nifti.index == (0 if sign > 0 else SHAPE[2] - 1)


def test_the_middle_slice_is_shown_with_a_warning(volume):
    image = read_image(_bytes(volume, np.eye(4)))
    assert (image.frame, image.n_frames) == (4, 9)
    assert "slice 4 of 9" in image.warnings[0]
    assert any("percentiles" in warning for warning in image.warnings)
    with pytest.raises(ImageReadError, match=r"slice 9 does not exist; it holds 9 \(0 to 8\)"):
        read_image(_bytes(volume, np.eye(4)), frame=9)


@pytest.mark.parametrize(
    ("unit", "expected", "warns"),
    [
        ("mm", (1.1, 0.7), False),
        ("unknown", (1.1, 0.7), True),
        ("meter", (1100, 700), False),
        ("micron", (0.0011, 0.0007), False),
    ],
)
def test_spacing_is_in_millimetres(volume, unit, expected, warns):
    image = read_image(_bytes(volume, np.diag([0.7, 1.1, 2.5, 1]), unit=unit), frame=4)
    np.testing.assert_allclose(image.pixel_spacing_mm, expected, rtol=1e-6)
    assert any("millimetres are assumed" in warning for warning in image.warnings) == warns


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64])
def test_both_versions_and_the_usual_voxel_types_are_read(kind, dtype):
    volume = np.tile(np.arange(10, dtype=dtype), (10, 3, 1)).transpose(2, 0, 1)  # (10, 10, 3), rises with x
    image = read_image(_bytes(volume, np.eye(4), kind=kind), frame=1)
    assert (np.diff(image.pixels[0].astype(int)) < 0).all()


def test_scaled_voxels_are_shown_in_their_unit():
    image = nibabel.Nifti1Image(np.arange(10 * 10 * 2).reshape(10, 10, 2).astype(np.float32), np.eye(4))
    image.header.set_data_dtype(np.int16)  # nibabel stores slope and intercept
    read = read_image(image.to_bytes(), frame=0)
    assert (read.pixels.min(), read.pixels.max()) == (0, 255)


def test_the_first_of_several_volumes_is_shown():
    data = np.zeros((10, 10, 4, 3), np.int16)
    data[2:5, 2:5, :, 0] = 100
    data[..., 1] = -30000
    image = read_image(_bytes(data, np.eye(4)), frame=1)
    assert np.count_nonzero(image.pixels) == 9
    assert any("first of 3 volumes" in warning for warning in image.warnings)


def test_a_plane_without_depth_is_one_slice():
    plane = np.arange(120, dtype=np.int16).reshape(10, 12)
    image = read_image(_bytes(plane, np.eye(4)))
    assert (image.pixels.shape, image.n_frames) == ((12, 10), 1)
    assert image.nifti.mask_to_volume(image.pixels).shape == (10, 12, 1)


def test_holes_become_the_minimum_and_a_slice_of_holes_is_refused():
    volume = np.tile(np.arange(100, dtype=np.float32).reshape(10, 10, 1), (1, 1, 3))
    volume[0, 0, 1], volume[5, 5, 1] = np.nan, np.inf
    volume[..., 2] = np.nan
    image = read_image(_bytes(volume, np.eye(4)), frame=1)
    assert image.pixels[-1, -1] == image.pixels[4, 4] == 0
    assert any("2 of 100" in warning for warning in image.warnings)
    with pytest.raises(ImageReadError, match="finite"):
        read_image(_bytes(volume, np.eye(4)), frame=2)


def test_a_label_map_uses_its_extremes():
    volume = np.zeros((30, 30, 1), np.uint8)
    volume[3, 3] = 1
    assert read_image(_bytes(volume, np.eye(4))).pixels.max() == 255


@pytest.mark.parametrize("cut", [100, 349, 400, 1500])
@pytest.mark.parametrize("packed", [False, True])
def test_truncated_volumes_are_refused(volume, cut, packed):
    data = _bytes(volume, np.eye(4), packed=packed)
    with pytest.raises(ImageReadError):
        read_image(data[:cut], frame=8)


def test_a_header_that_promises_more_than_memory_is_refused():
    header = bytearray(_bytes(np.zeros((8, 8, 8), np.int16), np.eye(4)))
    header[42:48] = np.array([32000, 32000, 32000], "<i2").tobytes()
    with pytest.raises(ImageReadError, match=r"32000 x 32000 = 1024000000 pixels is above max_pixels"):
        read_image(bytes(header))
    header[42:48] = np.array([32000, 8, 32000], "<i2").tobytes()
    with pytest.raises(ImageReadError, match="truncated"):
        read_image(gzip.compress(bytes(header)))


def test_colour_and_complex_voxels_are_refused():
    rgb = np.zeros((10, 10, 3), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    for data in (rgb, np.zeros((10, 10, 3), np.complex64)):
        with pytest.raises(ImageReadError, match="voxels are"):
            read_image(_bytes(data, np.eye(4)))


def test_one_half_of_a_pair_is_refused():
    pair = nibabel.Nifti1Pair(np.zeros((8, 8, 8), np.int16), np.eye(4))
    stream = io.BytesIO()
    pair.header.write_to(stream)
    with pytest.raises(ImageReadError, match="half of a NIfTI pair"):
        read_image(stream.getvalue())


def test_a_mask_of_another_shape_is_refused(volume):
    image = read_image(_bytes(volume, np.eye(4)), frame=1)
    with pytest.raises(OutputError, match=r"\(3, 3\)"):
        image.nifti.mask_to_volume(np.zeros((3, 3), bool))


def test_a_missing_nibabel_names_the_extra(volume, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises((MissingExtraError, ModuleNotFoundError), match="nibabel"):
        read_image(_bytes(volume, np.eye(4)))


def test_a_slice_across_the_planes_holds_no_more_than_itself():
    volume = np.zeros((300, 40, 200), np.uint8)
    affine = np.zeros((4, 4))
    affine[[2, 0, 1, 3], range(4)] = 1  # the first stored axis is the patient's long one
    data = _bytes(volume, affine, packed=True)
    tracemalloc.start()
    image = read_image(data, frame=3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert image.pixels.size == 40 * 200
    assert peak < volume.size / 2
