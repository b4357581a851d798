"""Backbones and images that several tests share."""

import pytest
import torch
from torch import Tensor

from h2t.backbones.loading import Backbone, load_backbone

# Architecture to image size; None is the model's own.
FAMILIES = {
    "test_resnet": 64,
    "resnetv2_18": 64,
    "test_efficientnet": 64,
    "mobilenetv3_small_050": 64,
    "test_convnext": 64,
    "regnetx_002": 64,
    "densenet121": 64,
    "test_vit": 64,
    "test_vit3": 160,
    "deit_tiny_distilled_patch16_224": 64,
    "swin_tiny_patch4_window7_224": 112,
    "test_maxvit": None,
    "test_coatnet": None,
    "mixer_s32_224": 64,
    "test_mambaout": 64,
    "test_nfnet": 64,
    "test_byobnet": 64,
    "pvt_v2_b0": 64,
    "poolformer_s12": 64,
}


@pytest.fixture(scope="session")
def lite0() -> Backbone:
    return load_backbone("efficientnet_lite0")


def some_images(backbone: Backbone, n: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, backbone.image_size, backbone.image_size, generator=generator)
