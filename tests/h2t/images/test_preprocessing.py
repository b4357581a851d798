"""Resizing and normalising: the official numbers derived by hand, and Pillow's bicubic."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from h2t.images.preprocessing import Preprocessing, prepare, to_batch
from h2t.images.source import EncodedImage


def grey(rows):
    """uint8 [height, width, 3] of one grey per pixel."""
    return np.repeat(np.array(rows, dtype=np.uint8)[..., None], 3, axis=2)


def resized(pixels, size):
    """The bilinear resize alone, float [S, S]: mean 0 and deviation 1/255 undo the normalisation."""
    plain = Preprocessing(size, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    return to_batch([prepare(pixels, plain)], plain)[0, 0].numpy()


def test_bilinear_enlarging_by_hand() -> None:
    # Pixel i of 4 lies at (i + 1/2) / 2 - 1/2 = -1/4, 1/4, 3/4, 5/4 of 2; outside is the edge pixel.
    np.testing.assert_allclose(resized(grey([[0, 100], [0, 100]]), 4)[0], [0, 25, 75, 100], atol=1e-4)


def test_bilinear_shrinking_is_not_antialiased() -> None:
    # Pixel i of 2 lies at (i + 1/2) 5/2 - 1/2 = 3/4 and 13/4 of 5: the middle one never counts.
    rows = grey([[40, 80, 255, 20, 100]] * 5)
    np.testing.assert_allclose(
        resized(rows, 2)[0], [0.25 * 40 + 0.75 * 80, 0.75 * 20 + 0.25 * 100], atol=1e-4
    )
    # From 6 to 2: at (i + 1/2) 3 - 1/2 = 1 and 4 exactly.
    np.testing.assert_allclose(resized(grey([[9, 50, 9, 9, 70, 9]] * 6), 2)[0], [50, 70], atol=1e-4)


def test_bilinear_does_not_keep_the_aspect_ratio() -> None:
    # 2 high, 4 wide to 2 x 2: rows stay, columns at 1/2 and 5/2 are means of neighbours.
    pixels = grey([[0, 10, 20, 30], [100, 110, 120, 130]])
    np.testing.assert_allclose(resized(pixels, 2), [[5, 25], [105, 125]], atol=1e-4)


def test_bilinear_in_both_directions_multiplies() -> None:
    # Corners 0, 40, 80, 240; the point (1/4, 3/4) from 2 x 2 to 4 x 4.
    pixels = grey([[0, 40], [80, 240]])
    expected = 0.75 * (0.25 * 0 + 0.75 * 40) + 0.25 * (0.25 * 80 + 0.75 * 240)
    np.testing.assert_allclose(resized(pixels, 4)[1, 2], expected, atol=1e-4)


def test_one_pixel_fills_the_image() -> None:
    batch = to_batch([np.full((1, 1, 3), 255, np.uint8)], Preprocessing(5))
    np.testing.assert_allclose(batch, np.ones((1, 3, 5, 5)), atol=1e-6)


def test_official_range_is_minus_one_to_one() -> None:
    batch = to_batch([grey([[0, 51], [204, 255]])], Preprocessing(2))
    np.testing.assert_allclose(batch[0, 1], [[-1, -0.6], [0.6, 1]], atol=1e-6)


def test_imagenet_normalisation_by_hand() -> None:
    later = Preprocessing(1, "bicubic", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    pixel = np.array([[[255, 0, 102]]], dtype=np.uint8)
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, (0.4 - 0.406) / 0.225]
    np.testing.assert_allclose(to_batch([prepare(pixel, later)], later)[0, :, 0, 0], expected, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
def test_bicubic_is_pillows(height, width, size, seed) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(prepare(pixels, Preprocessing(size, "bicubic")), expected)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
def test_bilinear_equals_its_definition(height, width, size, seed) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)

    def weights(length):
        place = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
        return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(length)))

    expected = weights(height) @ pixels[..., 0].astype(float) @ weights(width).T
    np.testing.assert_allclose(resized(pixels, size), expected, atol=2e-3)


def test_mixed_sizes_keep_their_places(random_pixels) -> None:
    images = [random_pixels(seed, height, 7) for seed, height in enumerate([5, 9, 5, 8, 9, 5])]
    together = to_batch(images, Preprocessing(8))
    for place, image in enumerate(images):
        torch.testing.assert_close(together[place], to_batch([image], Preprocessing(8))[0], rtol=0, atol=0)


def test_many_large_images_are_cut_into_chunks(random_pixels) -> None:
    images = [random_pixels(seed, 300, 200) for seed in range(12)]
    batch = to_batch(images, Preprocessing(16))
    torch.testing.assert_close(batch[11], to_batch(images[11:], Preprocessing(16))[0], rtol=0, atol=0)


def test_batch_layout_and_precision(random_pixels) -> None:
    images = [random_pixels(seed) for seed in range(3)]
    exact = to_batch(images, Preprocessing(10))
    assert exact.shape == (3, 3, 10, 10)
    assert exact.is_contiguous(memory_format=torch.channels_last)
    rounded = to_batch(images, Preprocessing(10), dtype=torch.bfloat16)
    torch.testing.assert_close(rounded, exact.to(torch.bfloat16), rtol=0, atol=0)


def test_empty_batch() -> None:
    assert to_batch([], Preprocessing(4)).shape == (0, 3, 4, 4)


@pytest.mark.parametrize(("height", "width"), [(90, 70), (33, 400), (17, 300)])
def test_a_large_image_is_resized_by_the_worker_to_the_same_bits(
    height: int, width: int, random_pixels
) -> None:
    pixels, preprocessing = random_pixels(0, height, width), Preprocessing(16)
    ready = prepare(pixels, preprocessing)
    assert (ready.dtype, ready.shape) == (np.float32, (16, 16, 3))
    together = to_batch([random_pixels(1, 20, 20), ready, random_pixels(2, 16, 16)], preprocessing)
    torch.testing.assert_close(together[1], to_batch([pixels], preprocessing)[0], rtol=0, atol=0)


@pytest.mark.parametrize("resize", ["bilinear", "bicubic"])
def test_what_a_worker_hands_on_is_bounded(resize, random_pixels) -> None:
    for height, width in ((5, 5), (31, 33), (64, 64), (300, 200)):
        assert prepare(random_pixels(0, height, width), Preprocessing(32, resize)).nbytes <= 12 * 32 * 32


def test_bilinear_workers_hand_on_the_stored_size(random_pixels, encode) -> None:
    pixels = random_pixels(0, 9, 4)
    np.testing.assert_array_equal(prepare(EncodedImage(encode(pixels), "a"), Preprocessing(32)), pixels)


@pytest.mark.parametrize("resize", ["bilinear", "bicubic"])
def test_an_image_of_the_right_size_is_left_alone(resize, random_pixels) -> None:
    pixels = random_pixels(0, 12, 12)
    preprocessing = Preprocessing(12, resize)
    batch = to_batch([prepare(pixels, preprocessing)], preprocessing)
    np.testing.assert_allclose((batch[0].permute(1, 2, 0) + 1) * 127.5, pixels, atol=1e-4)
