import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image as PilImage

from medreasoner.errors import ImageReadError
from medreasoner.image import read_image

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (12, 18), dtype=np.uint8)
RGB = RNG.integers(0, 256, (12, 18, 3), dtype=np.uint8)


def _save(picture, name, **options):
    stream = io.BytesIO()
    picture.save(stream, name, **options)
    return stream.getvalue()


@pytest.mark.parametrize("name", ["PNG", "TIFF", "BMP", "GIF"])
def test_grey_stays_grey(name):
    image = read_image(_save(PilImage.fromarray(GREY), name))
    np.testing.assert_array_equal(image.pixels if image.pixels.ndim == 2 else image.pixels[..., 0], GREY)
    assert image.warnings == ()


@pytest.mark.parametrize("name", ["PNG", "TIFF", "BMP"])
def test_rgb_keeps_its_channel_order(name):
    np.testing.assert_array_equal(read_image(_save(PilImage.fromarray(RGB), name)).pixels, RGB)


def test_jpeg_is_decoded_in_grey_and_colour():
    smooth = np.add.outer(np.arange(16), np.arange(24)).astype(np.uint8) * 4
    assert (
        np.abs(read_image(_save(PilImage.fromarray(smooth), "JPEG", quality=100)).pixels.astype(int) - smooth).max() < 4
    )
    red = PilImage.new("RGB", (16, 16), (220, 20, 20))
    assert np.abs(read_image(_save(red, "JPEG", quality=95)).pixels[8, 8].astype(int) - [220, 20, 20]).max() < 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_picture(orientation):
    """Each table row of EXIF: where the stored row 0 and column 0 belong in the picture as it is to be seen."""
    turns = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: np.transpose,
             6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).T, 8: np.rot90}  # fmt: skip
    exif = PilImage.Exif()
    exif[0x0112] = orientation
    image = read_image(_save(PilImage.fromarray(GREY), "PNG", exif=exif))
    np.testing.assert_array_equal(image.pixels, turns[orientation](GREY))


@pytest.mark.parametrize("name", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_by_the_values_used(name):
    stored = RNG.integers(100, 4096, (12, 18)).astype(np.uint16)
    image = read_image(_save(PilImage.fromarray(stored), name))
    low, high = int(stored.min()), int(stored.max())
    np.testing.assert_array_equal(image.pixels, np.floor((stored - low) / (high - low) * 255 + 0.5))
    assert f"({low} to {high})" in image.warnings[0]


def test_sixteen_bit_tiff_whose_zero_is_white_is_turned():
    stored = RNG.integers(100, 4096, (12, 18)).astype(np.uint16)
    plain = read_image(_save(PilImage.fromarray(stored), "TIFF"))
    turned = read_image(_save(PilImage.fromarray(stored), "TIFF", tiffinfo={262: 0}))
    np.testing.assert_array_equal(turned.pixels, 255 - plain.pixels)


def _deep_png(samples):
    """PNG of (rows, columns, 3) uint16, which Pillow does not write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows, columns, _ = samples.shape
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", columns, rows, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def _deep_tiff(samples):
    """The same as TIFF."""
    rows, columns, _ = samples.shape
    data = samples.astype("<u2").tobytes()
    start = 8 + 2 + 9 * 12 + 4
    tags = [
        (256, 3, 1, columns), (257, 3, 1, rows), (258, 3, 3, start), (259, 3, 1, 1), (262, 3, 1, 2),
        (273, 4, 1, start + 6), (277, 3, 1, 3), (278, 3, 1, rows), (279, 4, 1, len(data)),
    ]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)
    return head + struct.pack("<HHH", 16, 16, 16) + data


@pytest.mark.parametrize("encode", [_deep_png, _deep_tiff])
def test_sixteen_bit_colour_is_read_by_its_upper_bits_and_says_so(encode):
    samples = RNG.integers(0, 65536, (12, 18, 3)).astype(np.uint16)
    image = read_image(encode(samples))
    np.testing.assert_array_equal(image.pixels, samples >> 8)
    assert image.warnings == ("its colours have 16 bits, of which the upper 8 are read",)


@pytest.mark.parametrize("encode", [_deep_png, _deep_tiff])
def test_sixteen_bit_colour_that_would_be_black_is_refused(encode):
    with pytest.raises(ImageReadError, match="upper 8 are nearly empty"):
        read_image(encode(RNG.integers(0, 4096, (12, 18, 3)).astype(np.uint16)))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bit_tiff_is_scaled_by_the_values_used(dtype):
    stored = np.linspace(-7, 9, 216).reshape(12, 18).astype(dtype)
    image = read_image(_save(PilImage.fromarray(stored), "TIFF"))
    assert (image.pixels.min(), image.pixels.max()) == (0, 255)
    assert image.warnings


def test_black_and_white_palette_and_cmyk_become_display_values():
    bits = GREY > 127
    np.testing.assert_array_equal(read_image(_save(PilImage.fromarray(bits), "PNG")).pixels, bits * 255)
    palette = PilImage.fromarray(RGB).quantize(16)
    np.testing.assert_array_equal(read_image(_save(palette, "PNG")).pixels, np.asarray(palette.convert("RGB")))
    cmyk = PilImage.fromarray(RGB).convert("CMYK")
    np.testing.assert_array_equal(read_image(_save(cmyk, "TIFF")).pixels, RGB)


def test_transparency_is_laid_over_black():
    alpha = np.full((12, 18), 255, np.uint8)
    opaque = PilImage.fromarray(np.dstack([RGB, alpha]))
    assert read_image(_save(opaque, "PNG")).warnings == ()
    alpha[0] = 0
    image = read_image(_save(PilImage.fromarray(np.dstack([RGB, alpha])), "PNG"))
    assert (image.pixels[0] == 0).all()
    np.testing.assert_array_equal(image.pixels[1:], RGB[1:])
    assert "black" in image.warnings[0]
    grey = read_image(_save(PilImage.merge("LA", [PilImage.fromarray(GREY), PilImage.fromarray(alpha)]), "PNG"))
    np.testing.assert_array_equal(grey.pixels[1:], GREY[1:])
    assert grey.pixels.ndim == 2


@pytest.mark.parametrize(("name", "kind"), [("TIFF", "page"), ("GIF", "frame")])
def test_pages_and_frames_are_chosen_by_number(name, kind):
    pages = [PilImage.fromarray(np.full((12, 18), value, np.uint8)) for value in (10, 20, 30)]
    data = _save(pages[0], name, save_all=True, append_images=pages[1:])
    first = read_image(data)
    assert (first.frame, first.n_frames, first.pixels.flat[0]) == (0, 3, 10)
    assert f"{kind} 0 of 3" in first.warnings[0]
    assert read_image(data, frame=2).pixels.flat[0] == 30
    with pytest.raises(ImageReadError, match=rf"{kind} 3 does not exist; it holds 3 \(0 to 2\)"):
        read_image(data, frame=3)


def test_every_page_is_measured_before_it_is_decoded():
    small, large = PilImage.new("L", (10, 10)), PilImage.new("L", (100, 100))
    data = _save(small, "TIFF", save_all=True, append_images=[large])
    assert read_image(data, frame=0, max_pixels=100).height == 10
    with pytest.raises(ImageReadError, match="above max_pixels = 100"):
        read_image(data, frame=1, max_pixels=100)


def test_a_decompression_bomb_is_refused_before_decoding():
    def png(width, height):
        header = b"IHDR" + struct.pack(">2I5B", width, height, 1, 0, 0, 0, 0)
        data = b"IDAT" + zlib.compress(b"\0" * 100)
        chunks = [
            struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in (header, data)
        ]
        return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)

    with pytest.raises(ImageReadError, match=r"PIL\.Image\.MAX_IMAGE_PIXELS"):
        read_image(png(60000, 60000))
    with pytest.raises(ImageReadError, match=r"10000 x 10001 = 100010000 pixels is above max_pixels = 100000000"):
        read_image(png(10001, 10000))


@pytest.mark.parametrize("name", ["PNG", "JPEG", "TIFF", "BMP", "GIF"])
def test_truncated_pictures_are_refused_in_one_line(name):
    data = _save(PilImage.fromarray(np.tile(RGB, (4, 4, 1))), name)
    with pytest.raises(ImageReadError) as caught:
        read_image(data[: len(data) // 2])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["WEBP", "PPM", "ICO"])
def test_other_formats_of_pillow_are_not_opened(name):
    with pytest.raises(ImageReadError, match="unknown format"):
        read_image(_save(PilImage.fromarray(np.tile(RGB, (4, 4, 1))), name))


def test_a_picture_in_memory_shows_its_current_frame():
    pages = [PilImage.fromarray(np.full((12, 18), value, np.uint8)) for value in (10, 20)]
    picture = PilImage.open(io.BytesIO(_save(pages[0], "TIFF", save_all=True, append_images=pages[1:])))
    picture.seek(1)
    image = read_image(picture)
    assert (image.frame, image.pixels.flat[0]) == (1, 20)


def test_a_picture_in_memory_stays_where_it_was():
    pages = [PilImage.fromarray(np.full((12, 18), value, np.uint8)) for value in (10, 20, 30)]
    picture = PilImage.open(io.BytesIO(_save(pages[0], "TIFF", save_all=True, append_images=pages[1:])))
    assert read_image(picture, frame=2).pixels.flat[0] == 30
    assert picture.tell() == 0
    assert read_image(picture).pixels.flat[0] == 10
    with pytest.raises(ImageReadError):
        read_image(picture, frame=1, max_pixels=64)
    assert picture.tell() == 0
