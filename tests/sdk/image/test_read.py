import io
import logging
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PilImage

from medreasoner.errors import ImageReadError
from medreasoner.image import Image, read_image
from medreasoner.image.quiet import quiet


def _png(pixels):
    stream = io.BytesIO()
    PilImage.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def grey():
    return np.random.default_rng(0).integers(0, 256, (17, 23), dtype=np.uint8)


def test_importing_the_package_loads_no_imaging_library():
    code = (
        "import sys, medreasoner.image, medreasoner.samples\n"
        "print([m for m in ('pydicom', 'PIL', 'nibabel', 'torch', 'medreasoner._kernels') if m in sys.modules])"
    )
    sdk = Path(sys.modules["medreasoner.image"].__file__).parents[2]
    # Found through its files: the package's own __init__ may import more than this part of it.
    result = subprocess.run(
        [sys.executable, "-c", f"import sys, types; m = types.ModuleType('medreasoner'); "
         f"m.__path__ = [{str(sdk / 'medreasoner')!r}]; sys.modules['medreasoner'] = m\n{code}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stdout.strip() == "[]"


def test_an_array_never_imports_an_imaging_library():
    code = (
        "import sys, numpy as np\nfrom medreasoner.image import read_image\n"
        "read_image(np.zeros((9, 9), np.uint8)); print('PIL' in sys.modules, 'pydicom' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


def test_the_same_picture_comes_from_path_bytes_array_and_pillow(tmp_path, grey):
    path = tmp_path / "picture.dat"  # the ending says nothing
    path.write_bytes(_png(grey))
    sources = [path, str(path), path.read_bytes(), bytearray(path.read_bytes()), grey, PilImage.fromarray(grey)]
    images = [read_image(source) for source in sources]
    assert [image.source for image in images] == ["picture.dat", "picture.dat", "bytes", "bytes", "array", "Image"]
    for image in images:
        np.testing.assert_array_equal(image.pixels, grey)
        assert image.digest() == images[0].digest()
        assert (image.height, image.width, image.warnings) == (17, 23, ())


def test_pixels_are_a_read_only_copy(grey):
    array = grey.copy()
    image = read_image(array)
    array[:] = 0
    np.testing.assert_array_equal(image.pixels, grey)
    with pytest.raises(ValueError, match="read-only"):
        image.pixels[0, 0] = 1


def test_an_image_is_returned_as_it_is_and_refuses_another_frame(grey):
    image = read_image(grey)
    assert read_image(image) is image
    assert read_image(image, frame=0) is image
    with pytest.raises(ImageReadError, match="read as frame 0"):
        read_image(image, frame=1)


def test_digest_depends_on_shape_and_values(grey):
    flat = np.zeros((8, 16), np.uint8)
    assert read_image(flat).digest() != read_image(flat.reshape(16, 8)).digest()
    other = grey.copy()
    other[3, 4] ^= 1
    assert read_image(grey).digest() != read_image(other).digest()


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        pytest.param(np.tile([False, True], (8, 4)), [0, 255], id="bool"),
        pytest.param(np.tile(np.array([100, 300], np.uint16), (8, 4)), [0, 255], id="uint16"),
        pytest.param(np.tile(np.array([-5, 0, 5, 0], np.int32), (8, 2)), [0, 128, 255, 128], id="int32"),
        pytest.param(np.tile(np.array([0.0, 0.25, 1.0, 0.5]), (8, 2)), [0, 64, 255, 128], id="float64"),
        pytest.param(np.tile(np.array([-3e38, 3e38], np.float32), (8, 4)), [0, 255], id="widest float32"),
        pytest.param(np.tile(np.array([-1.7e308, 1.7e308]), (8, 4)), [0, 255], id="widest float64"),
        pytest.param(np.full((8, 8), 7.5), [0], id="constant"),
    ],
)
def test_other_dtypes_are_scaled_from_minimum_to_maximum(array, expected):
    image = read_image(array)
    np.testing.assert_array_equal(image.pixels[0, : len(expected)], expected)
    assert bool(image.warnings) == (array.dtype != np.bool_)


def test_some_nan_or_inf_become_the_minimum_and_all_are_refused():
    values = np.tile([1.0, np.nan, 3.0, np.inf, -np.inf, 2.0, 3.0, 3.0], (8, 1))
    image = read_image(values)
    assert image.pixels[0].tolist() == [0, 0, 255, 0, 0, 128, 255, 255]
    assert "24 of 64" in image.warnings[0]
    with pytest.raises(ImageReadError, match="finite"):
        read_image(np.full((8, 8), np.nan))


def test_transparent_arrays_are_laid_over_black():
    rgba = np.full((8, 8, 4), 200, np.uint8)
    rgba[..., 3] = 255
    assert read_image(rgba).warnings == ()
    rgba[0, 0, 3] = 0
    image = read_image(rgba)
    assert image.pixels[0, 0].tolist() == [0, 0, 0]
    assert image.pixels[1, 1].tolist() == [200, 200, 200]
    assert "black" in image.warnings[0]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        pytest.param(np.zeros((7, 100), np.uint8), "too small", id="seven rows"),
        pytest.param(np.zeros((100, 7), np.uint8), "too small", id="seven columns"),
        pytest.param(np.zeros((4, 16, 16), np.uint8), "shape", id="stack"),
        pytest.param(np.zeros((16, 16, 2), np.uint8), "shape", id="two channels"),
        pytest.param(np.zeros(64, np.uint8), "shape", id="one axis"),
        pytest.param(np.zeros((16, 16), np.complex64), "dtype", id="complex"),
        pytest.param(np.zeros((16, 16), object), "dtype", id="objects"),
        pytest.param(np.zeros((0, 16), np.uint8), "too small", id="no rows"),
        pytest.param(b"", "empty", id="no bytes"),
        pytest.param(b"GIF89a", "picture", id="only a magic"),
        pytest.param(b"%PDF-1.7 and so on", "unknown format", id="pdf"),
        pytest.param(b"\x1f\x8b rubbish", "unknown format", id="broken gzip"),
        pytest.param("no/such/file.dcm", "no such file", id="missing"),
        pytest.param("nul\0byte", "no such file", id="nul"),
        pytest.param(os.curdir, "folder", id="folder"),
        pytest.param("/dev/zero", "regular", id="device"),
        pytest.param("sample:nothing", "no such sample", id="sample"),
        pytest.param([[1, 2], [3, 4]], "expected a path", id="list"),
        pytest.param(None, "expected a path", id="none"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(source, reason):
    with pytest.raises(ImageReadError, match=reason) as caught:
        read_image(source)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, OSError)


def test_max_pixels_is_named_with_the_size(grey):
    assert read_image(grey, max_pixels=17 * 23).width == 23
    with pytest.raises(ImageReadError, match=r"17 x 23 = 391 pixels is above max_pixels = 390"):
        read_image(grey, max_pixels=390)


@pytest.mark.parametrize("frame", [1, -1, 10**30])
def test_a_frame_out_of_range_names_the_count(grey, frame):
    for source in (grey, _png(grey)):
        with pytest.raises(ImageReadError, match=r"holds 1 \(only frame 0\)"):
            read_image(source, frame=frame)


@pytest.mark.parametrize("frame", [0.0, "0", [0]])
def test_a_frame_that_is_no_integer_is_refused(grey, frame):
    with pytest.raises(ImageReadError, match="frame must be an integer"):
        read_image(grey, frame=frame)


def test_control_characters_of_a_file_name_do_not_reach_the_message():
    with pytest.raises(ImageReadError) as caught:
        read_image("a\n\x1b[2Jb.dcm")
    assert str(caught.value) == "a??[2Jb.dcm: no such file; check the path"


def test_the_record_refuses_other_pixels():
    for pixels in (np.zeros((8, 8), np.int16), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 16), np.uint8)[:, ::2]):
        with pytest.raises(ImageReadError):
            Image(pixels=pixels, source="array")


def test_the_representation_holds_neither_pixels_nor_header(make_dataset):
    image = read_image(make_dataset(np.full((8, 8), 77, np.uint8)))
    assert "77" not in repr(image)
    assert "Secret" not in repr(image)
    assert "SECRET" not in repr(image)


def test_library_warnings_and_log_records_do_not_reach_the_user(make_dataset, caplog):
    dataset = make_dataset(np.eye(8, dtype=np.uint8))
    dataset.PixelData += b"\0" * 100  # pydicom warns about the excess
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.DEBUG):
        warnings.simplefilter("always")
        image = read_image(dataset)
    assert caught == []
    assert caplog.records == []
    assert "100 bytes after" in " ".join(image.warnings)


def test_overlapping_readers_leave_the_warning_filters_as_they_were():
    before = list(warnings.filters)
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with quiet():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(10)
    with quiet():
        leave.set()
        thread.join()  # the first reader leaves while the second is inside
        with pytest.raises(UserWarning, match="from elsewhere"):  # warnings are errors here: others' are not silenced
            warnings.warn_explicit("from elsewhere", UserWarning, "x.py", 1, module="somebody.else")
    assert list(warnings.filters) == before
    assert logging.getLogger("pydicom").filters == []
