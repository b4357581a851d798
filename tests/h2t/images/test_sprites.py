"""The sprites against their recipe."""

import numpy as np
import pytest

from h2t.images import sprites


def latents(shape, scale=5, orientation=0, x=16, y=16):
    return np.array([[shape, scale, orientation, x, y]])


def white(shape, **others):
    """bool [64, 64]."""
    return sprites.render(latents(shape, **others))[0, :, :, 0] == 255


def test_images_are_binary_rgb() -> None:
    images = sprites.render(sprites.random_latents(200, seed=0))
    assert images.shape == (200, 64, 64, 3)
    assert images.dtype == np.uint8
    assert set(np.unique(images)) == {0, 255}
    assert (images == images[..., :1]).all()


def test_the_mean_pixel_is_the_published_one() -> None:
    """Over all shapes, scales and orientations, at four places."""
    codes = [np.arange(n) for n in (sprites.N_SHAPES, sprites.N_SCALES, sprites.N_ORIENTATIONS)]
    everything = np.array(np.meshgrid(*codes, [3, 28], [7, 20])).reshape(5, -1).T
    pixels = sprites.render(everything) / 255
    np.testing.assert_allclose(pixels.mean(), sprites.MEAN_PIXEL, rtol=0.01)
    np.testing.assert_allclose(pixels.std(), 0.20171, rtol=0.005)


@pytest.mark.parametrize("shape", range(sprites.N_SHAPES))
def test_the_centre_of_mass_is_at_the_position(shape: int) -> None:
    for orientation, x, y in ((0, 0, 0), (7, 31, 0), (20, 10, 25), (33, 0, 31)):
        rows, columns = np.nonzero(white(shape, orientation=orientation, x=x, y=y))
        centres = np.linspace(16, 48, sprites.N_POSITIONS)
        np.testing.assert_allclose([columns.mean() + 0.5, rows.mean() + 0.5], centres[[x, y]], atol=0.3)


def test_upright_square_is_18_pixels_wide_at_scale_one() -> None:
    # The centre of place 0 is at pixel 16, so the square covers the pixel centres 7.5 to 24.5.
    rows, columns = np.nonzero(white(0, x=0, y=0))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (7, 24, 7, 24)
    assert white(0, scale=5, x=0, y=0).sum() == 18 * 18
    # 4.455 pixels either side of 16: centres 12.5 to 19.5 inclusive.
    assert white(0, scale=0, x=0, y=0).sum() == 8 * 8


def test_area_grows_with_the_square_of_the_scale() -> None:
    for shape in range(sprites.N_SHAPES):
        areas = [white(shape, scale=scale, orientation=3).sum() for scale in range(sprites.N_SCALES)]
        np.testing.assert_allclose(np.sqrt(areas / areas[-1]), np.linspace(0.5, 1, 6), rtol=0.05)


def test_ellipse_area_and_half_axes() -> None:
    inside = white(1, x=0, y=0)
    np.testing.assert_allclose(inside.sum(), np.pi * 12.15 * 6.48, rtol=0.04)
    rows, columns = np.nonzero(inside)
    assert (np.ptp(columns) + 1, np.ptp(rows) + 1) == (24, 12)


def test_heart_points_down_and_is_symmetric_left_to_right() -> None:
    inside = white(2, x=0, y=0)[:, :32]
    np.testing.assert_array_equal(inside, inside[:, ::-1])
    widths = inside.sum(axis=1)[inside.any(axis=1)]
    assert widths[-1] < widths[: len(widths) // 2].max() / 3


def test_full_turn_ends_where_it_began_and_a_heart_turns_in_between() -> None:
    for shape in range(sprites.N_SHAPES):
        np.testing.assert_array_equal(white(shape, orientation=0), white(shape, orientation=39))
    assert (white(2, orientation=0) != white(2, orientation=20)).any()


def test_positions_move_right_and_down_and_nothing_is_cut_off() -> None:
    for shape in range(sprites.N_SHAPES):
        for orientation in range(sprites.N_ORIENTATIONS):
            corners = [white(shape, orientation=orientation, x=x, y=y) for x in (0, 31) for y in (0, 31)]
            moved = np.roll(corners[0], (32, 32), axis=(0, 1))
            np.testing.assert_array_equal(corners[3], moved)
            np.testing.assert_array_equal(corners[1], np.roll(corners[0], 32, axis=0))
            # The corner image's sprite lies within its own quarter: it fits a circle of 16 pixels.
            assert corners[0][:32, :32].sum() == corners[0].sum()


def test_random_latents_differ_are_seeded_and_cover_every_value() -> None:
    chosen = sprites.random_latents(2000, seed=1)
    np.testing.assert_array_equal(chosen, sprites.random_latents(2000, seed=1))
    assert (chosen != sprites.random_latents(2000, seed=2)).any()
    places = chosen[:, [0, 1, 3, 4]]
    assert len(np.unique(places, axis=0)) == 2000
    counts = (sprites.N_SHAPES, sprites.N_SCALES, sprites.N_ORIENTATIONS, 32, 32)
    assert [len(np.unique(column)) for column in chosen.T] == list(counts)


def test_labels_are_vtabs_bins() -> None:
    all_orientations = np.array([[0, 0, orientation, 0, 0] for orientation in range(40)])
    widths = np.bincount(sprites.orientation_labels(all_orientations))
    assert widths.tolist() == [3, 2] * 8
    all_columns = np.array([[0, 0, 0, x, 0] for x in range(32)])
    assert np.bincount(sprites.location_labels(all_columns)).tolist() == [2] * 16
    assert (
        sprites.location_labels(all_columns).dtype
        == sprites.orientation_labels(all_columns).dtype
        == np.int32
    )
