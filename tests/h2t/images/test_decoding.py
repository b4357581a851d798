"""Decoding: every kind of image that data sets hold, and those that are no images."""

import io
import pickle
import struct
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from h2t.images.lossy import describe_encoding
from h2t.images.preprocessing import decode
from h2t.images.source import BadImage, EncodedImage
from h2t.tasks import find_task


@pytest.mark.parametrize(
    ("format", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("TIFF", {})]
)
def test_lossless_formats_come_back_exactly(format: str, options, random_pixels, encode) -> None:
    pixels = random_pixels()
    np.testing.assert_array_equal(decode(EncodedImage(encode(pixels, format, **options), "a")), pixels)


def test_jpeg_of_a_flat_colour(encode) -> None:
    pixels = np.full((16, 16, 3), (200, 100, 50), dtype=np.uint8)
    decoded = decode(EncodedImage(encode(pixels, "JPEG"), "a"))
    assert np.abs(decoded.astype(int) - pixels).max() <= 2


def test_pixels_pass_unchanged_and_uncopied(random_pixels) -> None:
    pixels = random_pixels()
    assert decode(pixels) is pixels


def test_grey_is_repeated(encode) -> None:
    grey = np.array([[0, 7], [128, 255]], dtype=np.uint8)
    decoded = decode(EncodedImage(encode(grey), "a"))
    np.testing.assert_array_equal(decoded, np.repeat(grey[..., None], 3, axis=2))


def test_one_bit_is_black_and_white(encode) -> None:
    bits = Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).convert("1")
    assert decode(EncodedImage(encode(bits), "a"))[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_range(format: str, encode) -> None:
    grey = np.array([[0, 128, 129, 257, 32768, 65406, 65407, 65535]], dtype=np.uint16)
    decoded = decode(EncodedImage(encode(grey, format), "a"))
    assert decoded[0, :, 2].tolist() == [0, 0, 1, 1, 128, 254, 255, 255]


def test_integers_beyond_sixteen_bits_and_floats_are_bad(encode) -> None:
    wide = Image.fromarray(np.array([[0, 70_000]], dtype=np.int32))
    with pytest.raises(BadImage, match=r"16-bit grey in 0\.\.65535, got values in 0\.\.70000"):
        decode(EncodedImage(encode(wide, "TIFF"), "a"))
    with pytest.raises(BadImage, match="floating-point"):
        decode(EncodedImage(encode(np.zeros((2, 2), dtype=np.float32), "TIFF"), "a"))


def test_cmyk_becomes_rgb(encode) -> None:
    inks = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    decoded = decode(EncodedImage(encode(inks, "TIFF"), "a"))
    assert decoded[0, 0].tolist() == [255, 0, 0]
    assert decode(EncodedImage(encode(inks, "JPEG"), "a"))[0, 0, 0] > 240


def test_alpha_is_dropped_not_blended(encode) -> None:
    pixels = np.array([[[10, 20, 30, 0], [40, 50, 60, 255]]], dtype=np.uint8)
    np.testing.assert_array_equal(decode(EncodedImage(encode(pixels), "a")), pixels[..., :3])
    grey_alpha = Image.fromarray(np.array([[[77, 0]]], dtype=np.uint8), mode=None)
    assert decode(EncodedImage(encode(grey_alpha), "a"))[0, 0].tolist() == [77, 77, 77]


@pytest.mark.parametrize("transparency", [None, 1, b"\x00\xff"])
def test_palette_is_looked_up(transparency, encode) -> None:
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8)).convert("P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    options = {} if transparency is None else {"transparency": transparency}
    decoded = decode(EncodedImage(encode(image, **options), "a"))
    assert decoded.tolist() == [[[255, 0, 0], [0, 0, 255]]]


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(format: str, encode) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert decode(EncodedImage(data, "a")).reshape(-1, 3)[0].tolist() == [255, 0, 0]


def test_orientation_tag_is_ignored(encode) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(EncodedImage(encode(np.zeros((2, 5, 3), dtype=np.uint8), exif=exif), "a")).shape == (
        2,
        5,
        3,
    )


def test_one_pixel(encode) -> None:
    assert decode(EncodedImage(encode(np.array([[[1, 2, 3]]], dtype=np.uint8)), "a")).tolist() == [
        [[1, 2, 3]]
    ]


def test_bad_files_name_themselves(random_pixels, encode) -> None:
    png, jpeg = encode(random_pixels(0, 64, 64)), encode(random_pixels(0, 64, 64), "JPEG")
    damaged = {
        "missing or empty file": b"",
        "not an image: it begins with b'<html>": b"<html>404</html>",
        "cannot be decoded": png[: len(png) // 2],
        "truncated": jpeg[: len(jpeg) // 2],
        "broken": png[:60] + bytes(40) + png[100:],
    }
    for reason, data in damaged.items():
        with pytest.raises(BadImage, match=reason) as caught:
            decode(EncodedImage(data, "some/where.png"))
        assert str(caught.value).startswith("some/where.png: ")


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3)),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_arrays_of_another_kind_are_bad(array) -> None:
    with pytest.raises(BadImage, match=r"expected uint8 \[height, width, 3\]"):
        decode(array)


def test_damaged_bytes_are_bad_images_and_nothing_else(random_pixels, encode) -> None:
    """Whatever a reader makes of damage: pixels, or BadImage; and the provenance never fails on it."""
    generator = np.random.default_rng(0)
    for format in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM", "JPEG2000"):
        whole = np.frombuffer(encode(random_pixels(), format), dtype=np.uint8)
        for _ in range(40):
            damaged = whole[: generator.integers(1, len(whole) + 1)].copy()
            damaged[generator.integers(0, len(damaged), 3)] = generator.integers(0, 256, 3)
            with suppress(BadImage):
                assert decode(EncodedImage(damaged.tobytes(), "a")).dtype == np.uint8
            assert describe_encoding(damaged.tobytes(), find_task("pets"))


def test_an_impossible_size_is_bad(encode) -> None:
    header = bytearray(encode(np.zeros((2, 2, 3), dtype=np.uint8), "BMP"))
    header[18:26] = struct.pack("<ii", 100_000, 100_000)
    with pytest.raises(BadImage, match="exceeds limit"):
        decode(EncodedImage(bytes(header), "a"))
    assert describe_encoding(bytes(header), find_task("pets")) == "unknown"


def test_bad_image_survives_pickling_between_workers() -> None:
    error = pickle.loads(pickle.dumps(BadImage("a.png", "damaged")))  # noqa: S301
    assert (error.path, error.reason, str(error)) == ("a.png", "damaged", "a.png: damaged")


def test_a_large_colour_profile_is_no_reason_to_refuse_a_good_image(random_pixels) -> None:
    pixels, written = random_pixels(0, 8, 8), io.BytesIO()
    profile = np.random.default_rng(0).bytes(2_000_000)
    Image.fromarray(pixels).save(written, "PNG", icc_profile=profile)
    np.testing.assert_array_equal(decode(EncodedImage(written.getvalue(), "a.png")), pixels)


@pytest.mark.parametrize(
    ("dtype", "peak", "format"),
    [("uint16", 4095, "PNG"), ("int32", 255, "TIFF"), ("uint16", 8000, "TIFF")],
)
def test_a_fraction_of_sixteen_bits_is_refused_instead_of_losing_its_levels(dtype, peak, format) -> None:
    written = io.BytesIO()
    values = np.linspace(0, peak, 64 * 64).reshape(64, 64).astype(dtype)
    Image.fromarray(values).save(written, format)
    with pytest.raises(BadImage, match=f"values up to {peak} alone, of which .* grey levels would stay"):
        decode(EncodedImage(written.getvalue(), "a"))


@pytest.mark.parametrize("values", [np.full((4, 4), 300), np.linspace(0, 65535, 4096).reshape(64, 64)])
def test_other_images_of_sixteen_bits_are_read(values) -> None:
    """All of one grey, which loses nothing; and the whole range."""
    written = io.BytesIO()
    Image.fromarray(values.astype(np.uint16)).save(written, "PNG")
    pixels = decode(EncodedImage(written.getvalue(), "a"))
    assert len(np.unique(pixels)) == min(256, len(np.unique(values)))


def test_only_formats_of_images_are_opened_whatever_a_file_is_called() -> None:
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(run me) print\n%%EOF\n"
    with pytest.raises(BadImage, match="not an image"):
        decode(EncodedImage(script, "photo.png"))


def test_a_small_file_of_very_many_pixels_is_a_bad_image() -> None:
    buffer = io.BytesIO()
    Image.new("1", (9000, 9000)).save(buffer, "png")
    assert len(buffer.getvalue()) < 20_000
    with pytest.raises(BadImage, match="9000 × 9000 pixels; expected at most 67,108,864"):
        decode(EncodedImage(buffer.getvalue(), "bomb.png"))
