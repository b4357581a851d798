"""Small images, as pixels and as the bytes of files."""

import io

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def random_pixels():
    """Makes uint8 [height, width, 3] noise by seed."""

    def make(seed=0, height=8, width=6):
        return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)

    return make


@pytest.fixture
def encode():
    """Writes pixels, or a Pillow image, as the bytes of a file."""

    def write(pixels, format="PNG", **options):
        image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
        buffer = io.BytesIO()
        image.save(buffer, format=format, **options)
        return buffer.getvalue()

    return write
