"""Images without labels: where they are looked for, and in which order they come."""

import io
from pathlib import Path

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from h2t.errors import UserError
from h2t.images.preprocessing import decode
from h2t.images.unlabelled import find_images


def brightness(places: list[str]) -> list[int]:
    """Of every image, in order; the number of images is known beforehand."""
    found = find_images(places)
    values = [int(decode(image)[0, 0, 0]) for files in found for image in files]
    assert sum(files.n_images for files in found) == len(values)
    return values


def parquet(images: list[bytes]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": images}), sink)
    return sink.getvalue()


@pytest.fixture
def images(encode) -> list[bytes]:
    """Of a brightness of their own."""
    return [encode(np.full((2, 2, 3), number, np.uint8)) for number in range(12)]


def test_folders_patterns_files_and_tables(images: list[bytes], tmp_path: Path) -> None:
    for number, data in enumerate(images[:6]):
        (tmp_path / f"{number}.png").write_bytes(data)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "10.PNG").write_bytes(images[10])
    (tmp_path / "deep" / "note.txt").write_text("not an image")
    (tmp_path / "deep" / "rows.parquet").write_bytes(parquet(images[7:9]))
    pq.write_table(pa.table({"image": ["a.png"], "label": ["ant"]}), tmp_path / "predictions.parquet")
    (tmp_path / "without").write_bytes(images[11])
    assert brightness([str(tmp_path)]) == [0, 1, 2, 3, 4, 5, 10, 7, 8]
    assert brightness([f"{tmp_path}/[135].png", str(tmp_path / "without")]) == [1, 3, 5, 11]
    with pytest.raises(UserError, match=r"column 'image' of .* is string"):
        find_images([str(tmp_path / "predictions.parquet")])


def test_an_object_store(s3: str, images: list[bytes]) -> None:
    client = boto3.client("s3", endpoint_url=f"http://{s3}")
    for number, data in enumerate(images):
        client.put_object(Bucket="images", Key=f"photos/{number}.png", Body=data)
    client.put_object(Bucket="images", Key="rows/some.parquet", Body=parquet(images[3:6]))
    options = f"?endpoint_override={s3}&scheme=http"
    assert brightness([f"s3://images/photos{options}"]) == list(range(12))
    assert brightness([f"s3://images/rows{options}", f"s3://images/photos/7.png{options}"]) == [3, 4, 5, 7]
    with pytest.raises(UserError, match="there is nothing at 's3://images/nowhere"):
        find_images([f"s3://images/nowhere{options}"])
