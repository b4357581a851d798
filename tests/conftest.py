"""One thread, since sums in another order differ in the last digits, which goldens see; shared fixtures."""

import io
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest
import torch
from moto.server import ThreadedMotoServer
from PIL import Image

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """Host and port of a real server that speaks the S3 protocol, on loopback, with "runs" and "images"."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        for bucket in ("runs", "images"):
            client.create_bucket(Bucket=bucket)
        yield f"{host}:{port}"
        server.stop()


@pytest.fixture
def encode() -> Callable[..., bytes]:
    """Writes pixels, or a Pillow image, as the bytes of a file."""

    def write(pixels: Any, format: str = "PNG", **options: Any) -> bytes:
        image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
        buffer = io.BytesIO()
        image.save(buffer, format=format, **options)
        return buffer.getvalue()

    return write
