"""White shapes on black, drawn to the published recipe of dSprites.

64 x 64 binary images; square, ellipse or heart; 6 scales in [0.5, 1]; 40 orientations in [0, 2 pi], both ends
included; 32 x 32 positions. A pixel is white where its centre lies inside the shape: no antialiasing.

The recipe leaves the size of the shapes open. Here it is such that the mean pixel over all latents is that of
the published images, :data:`MEAN_PIXEL`; the proportions of the three are ours. A shape's centre of mass lies
at its position, which moves over the middle half of the image, so that every shape is whole at every place.
"""

import numpy as np

IMAGE_SIZE = 64
N_SHAPES, N_SCALES, N_ORIENTATIONS, N_POSITIONS = 3, 6, 40, 32
MEAN_PIXEL = 0.042494
"""Of the 737,280 images of dSprites, white being 1: what people who train on them normalise by, as mean with
the deviation 0.20171 (which follows from it, since pixels are 0 or 1)."""
LATENTS = ("shape", "scale", "orientation", "x", "y")

_SCALES = np.linspace(0.5, 1, N_SCALES, dtype=np.float32)
_ANGLES = np.linspace(0, 2 * np.pi, N_ORIENTATIONS, dtype=np.float32)
_CENTRES = np.linspace(16, 48, N_POSITIONS, dtype=np.float32)
# All lengths are in pixels at scale 1.
_SQUARE_HALF_SIDE = np.float32(8.91)
_ELLIPSE_HALF_AXES = np.array([12.15, 6.48], dtype=np.float32)
_HEART_UNIT = np.float32(9.315)
_HEART_CENTRE = np.float32(0.2935)  # of mass, above the origin of its curve, in units of that


def random_latents(n_images: int, seed: int) -> np.ndarray:
    """Latents of ``n_images`` images that all differ, int64 [n_images, 5] in the order of ``LATENTS``.

    Every value of a latent is equally likely. No two images share shape, scale and position, since turning
    a shape does not always change its pixels (a square, or from 0 to 2 pi).
    """
    generator = np.random.default_rng(seed)
    n_codes = N_SHAPES * N_SCALES * N_POSITIONS * N_POSITIONS
    codes = generator.choice(n_codes, n_images, replace=False)
    shape, scale, x, y = np.unravel_index(codes, (N_SHAPES, N_SCALES, N_POSITIONS, N_POSITIONS))
    return np.stack([shape, scale, generator.integers(N_ORIENTATIONS, size=n_images), x, y], axis=1)


def render(latents: np.ndarray) -> np.ndarray:
    """Draws sprites: latents, integers [n, 5] -> uint8 [n, 64, 64, 3], background 0 and shape 255."""
    shape, scale, orientation, x, y = np.asarray(latents).T
    grid = np.arange(IMAGE_SIZE, dtype=np.float32) + np.float32(0.5)
    right = (grid[None, None, :] - _CENTRES[x][:, None, None]) / _SCALES[scale][:, None, None]
    up = (_CENTRES[y][:, None, None] - grid[None, :, None]) / _SCALES[scale][:, None, None]
    cosine, sine = (f(_ANGLES[orientation])[:, None, None] for f in (np.cos, np.sin))
    along, across = cosine * right + sine * up, cosine * up - sine * right
    inside = np.empty(along.shape, dtype=bool)
    for code, contains in enumerate((_in_square, _in_ellipse, _in_heart)):
        chosen = shape == code
        inside[chosen] = contains(along[chosen], across[chosen])
    return np.repeat(np.uint8(255) * inside[..., None], 3, axis=-1)


def _in_square(along: np.ndarray, across: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(along), np.abs(across)) <= _SQUARE_HALF_SIDE


def _in_ellipse(along: np.ndarray, across: np.ndarray) -> np.ndarray:
    return np.square(along / _ELLIPSE_HALF_AXES[0]) + np.square(across / _ELLIPSE_HALF_AXES[1]) <= 1


def _in_heart(along: np.ndarray, across: np.ndarray) -> np.ndarray:
    """The sextic (x^2 + y^2 - 1)^3 <= x^2 y^3."""
    x, y = np.square(along / _HEART_UNIT), across / _HEART_UNIT + _HEART_CENTRE
    disc = x + np.square(y) - 1
    return disc * disc * disc <= x * y * y * y


def location_labels(latents: np.ndarray) -> np.ndarray:
    """VTAB's dSpr-Loc: 32 columns in 16 bins of two, integers [n, 5] -> int32 [n]."""
    return (np.asarray(latents)[:, LATENTS.index("x")] // 2).astype(np.int32)


def orientation_labels(latents: np.ndarray) -> np.ndarray:
    """VTAB's dSpr-Ori: 40 orientations in 16 bins, floor(orientation / 2.5), integers [n, 5] -> int32 [n]."""
    return np.floor(np.asarray(latents)[:, LATENTS.index("orientation")] / 2.5).astype(np.int32)
