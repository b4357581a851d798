"""Images in an object store: a real server that speaks the S3 protocol, on loopback."""

import io
import tarfile
from dataclasses import replace

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from h2t.errors import UserError
from h2t.images.formats import open_source
from h2t.images.prepare_vtab import RULES, prepare_task
from h2t.images.preprocessing import decode
from h2t.images.source import SourceUnavailable, check_rows
from h2t.tasks import find_task

TASK = find_task("eurosat")
LABELS = [3, 1, 2, 0, 4]


@pytest.fixture
def put(s3):
    """Stores an object."""
    client = boto3.client("s3", endpoint_url=f"http://{s3}")
    return lambda key, data: client.put_object(Bucket="images", Key=key, Body=data)


def root(s3, folder) -> str:
    return f"s3://images/{folder}?endpoint_override={s3}&scheme=http"


@pytest.fixture
def stored(put, encode):
    """Writes the same five images in one of the formats for both splits; returns their pixels."""

    def write(format):
        pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
        images = [encode(image) for image in pixels]
        for split in ("train", "test"):
            for name, data in _FILES[format](split, images):
                put(f"{format}/eurosat/{name}", data)
        return pixels

    return write


def _archive(split, images):
    name = "train800val200" if split == "train" else split
    paths = [f"images/{name}/{number:06d}.png" for number in range(5)]
    lines = "\n".join(f"{path} {label}" for path, label in zip(paths, LABELS, strict=True))
    return [*zip(paths, images, strict=True), (f"{name}.txt", lines.encode())]


def _folder(split, images):
    # In the order of the classes, so that rows can be told apart by their label.
    return [(f"{split}/class_{label}/a.png", image) for label, image in zip(LABELS, images, strict=True)]


def _parquet(split, images):
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": images, "label": LABELS}), buffer, row_group_size=2)
    return [(f"{split}.parquet", buffer.getvalue())]


def _shard(split, images):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number, (label, image) in enumerate(zip(LABELS, images, strict=True)):
            for suffix, data in (("png", image), ("cls", str(label).encode())):
                header = tarfile.TarInfo(f"s{number}.{suffix}")
                header.size = len(data)
                archive.addfile(header, io.BytesIO(data))
    return [(f"{split}/0.tar", buffer.getvalue())]


_FILES = {"vtab1k": _archive, "folder": _folder, "parquet": _parquet, "webdataset": _shard}


@pytest.mark.parametrize("format", list(_FILES))
def test_every_format_reads_from_an_object_store(format: str, stored, s3) -> None:
    pixels = stored(format)
    source = open_source(format, TASK, root(s3, format), {})
    for split in ("train", "test"):
        labels = source.labels(split).tolist()
        assert sorted(labels) == [0, 1, 2, 3, 4]
        assert check_rows(source, TASK, split) == []
        for label, image in zip(labels, source.read(split, range(5)), strict=True):
            np.testing.assert_array_equal(decode(image), pixels[LABELS.index(label)])
    assert source.provenance()["encoding"] == "PNG"


@pytest.mark.parametrize("format", list(_FILES))
def test_other_content_of_the_same_size_is_another_identity(format: str, stored, s3, put) -> None:
    stored(format)
    before = open_source(format, TASK, root(s3, format), {}).identity("test")
    assert open_source(format, TASK, root(s3, format), {}).identity("test") == before
    client = boto3.client("s3", endpoint_url=f"http://{s3}")
    listed = client.list_objects_v2(Bucket="images", Prefix=f"{format}/eurosat/")["Contents"]
    keys = [item["Key"] for item in listed if not item["Key"].endswith(".txt")]
    key = next(key for key in keys if "test" in key)
    data = bytearray(client.get_object(Bucket="images", Key=key)["Body"].read())
    data[data.index(b"IDAT") + 8] ^= 1  # in the middle of an image
    put(key, bytes(data))
    assert open_source(format, TASK, root(s3, format), {}).identity("test") != before


def test_missing_objects_are_rows_like_missing_files(stored, put, s3) -> None:
    stored("vtab1k")
    put("vtab1k/eurosat/test.txt", b"images/test/000009.png 1\nimages/test/000000.png 2\n")
    source = open_source("vtab1k", TASK, root(s3, "vtab1k"), {})
    assert [(row.index, row.reason) for row in check_rows(source, TASK, "test")] == [(0, "missing file")]
    missing, there = source.read("test", [0, 1])
    assert missing.data == b""
    assert decode(there).shape == (4, 6, 3)


def test_roots_that_are_not_there(s3) -> None:
    with pytest.raises(SourceUnavailable, match="are not at"):
        open_source("parquet", TASK, root(s3, "nowhere"), {})
    nobody = "s3://images/there?endpoint_override=127.0.0.1:9&scheme=http"  # nothing listens on this port
    with pytest.raises(SourceUnavailable, match="the images of eurosat: cannot look into s3://images/there"):
        open_source("parquet", TASK, nobody, {})
    with pytest.raises(UserError, match="cannot open the image root 'ftp://"):
        open_source("parquet", TASK, "ftp://somewhere/else", {})


def test_prepared_to_an_object_store(s3, encode, monkeypatch: pytest.MonkeyPatch) -> None:
    image = encode(np.full((2, 2, 3), 7, dtype=np.uint8))
    records = {"train": [{"image": image, "label": number % 10} for number in range(27_000)]}
    monkeypatch.setitem(RULES, "eurosat", _smaller(RULES["eurosat"]))
    destination = root(s3, "prepared")
    assert prepare_task(TASK, "", destination, records=records) == {
        "train": 1000,
        "test": 40,
        "first1000": 1000,
    }
    source = open_source("parquet", TASK, destination, {})
    assert source.labels("test").tolist() == [number % 10 for number in range(21_600, 21_640)]
    assert decode(source.read("train", [999])[0]).max() == 7


def _smaller(recipe):
    return replace(recipe, test="train[21600:21640]")
