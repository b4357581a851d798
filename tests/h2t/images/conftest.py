"""Small images as pixels."""

import numpy as np
import pytest


@pytest.fixture
def random_pixels():
    """Makes uint8 [height, width, 3] noise by seed."""

    def make(seed=0, height=8, width=6):
        return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)

    return make
