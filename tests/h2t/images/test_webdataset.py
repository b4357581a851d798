"""WebDataset shards."""

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from h2t.errors import UserError
from h2t.images.formats import open_source
from h2t.images.preprocessing import decode
from h2t.images.source import SourceUnavailable, check_rows
from h2t.tasks import Task, find_task

TASK = Task("dmlab_at_home", "DMLab", "other", 3, n_train=0)


@pytest.fixture
def shard(tmp_path: Path, encode):
    """Writes members (name, bytes or text) to a tar file."""

    def write(path, members, format=tarfile.USTAR_FORMAT):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(tmp_path / path, "w", format=format) as archive:
            for name, content in members:
                data = content.encode() if isinstance(content, str) else content
                header = tarfile.TarInfo(name)
                header.size = len(data)
                archive.addfile(header, io.BytesIO(data))
        return tmp_path

    return write


@pytest.fixture
def sample(encode):
    """Members of one sample: an image of a brightness, and its label."""

    def make(key, value, label, format="webp"):
        options = {"lossless": True} if format == "webp" else {}
        name = {"jpg": "JPEG"}.get(format, format.upper())
        image = encode(np.full((3, 2, 3), value, dtype=np.uint8), name, **options)
        return [(f"{key}.{format}", image), (f"{key}.cls", str(label))]

    return make


def brightness(source, split, rows):
    return [int(decode(image)[0, 0, 0]) for image in source.read(split, rows)]


@pytest.mark.parametrize("format", ["webp", "png", "jpg"])
@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_shards_as_on_the_hub(format: str, tar_format, shard, sample) -> None:
    shard("train/0.tar", [*sample("s0000000", 10, 2, format), *sample("s0000001", 20, 0, format)], tar_format)
    root = shard("test/0.tar", sample("s0000000", 30, 1, format), tar_format)
    (root / "train" / "nshards.txt").write_text("1")
    source = pickle.loads(pickle.dumps(open_source("webdataset", TASK, str(root), {})))  # noqa: S301
    assert source.labels("train").tolist() == [2, 0]
    assert source.labels("test").tolist() == [1]
    assert brightness(source, "train", [1, 0, 1]) == [20, 10, 20]
    assert source.read("train", [0])[0].path.endswith("train/0.tar#s0000000")
    assert check_rows(source, TASK, "train") == []


def test_shards_and_samples_in_order(shard, sample) -> None:
    for number in (0, 10, 2):
        members = [member for key in (5, 3) for member in sample(f"s{key}", 10 * number + key, 0)]
        shard(f"train/{number}.tar", members)
    root = shard("test/0.tar", sample("s0", 0, 0))
    source = open_source("webdataset", TASK, str(root), {})
    assert brightness(source, "train", range(6)) == [5, 3, 25, 23, 105, 103]
    assert brightness(source, "train", [5, 0, 3]) == [103, 5, 23]


def test_members_in_either_order_folders_and_other_files(shard, sample) -> None:
    first, second = sample("deep/er/s0", 1, 1), sample("s1", 2, 2)
    members = [first[1], first[0], ("deep/er/s0.json", "{}"), second[0], ("s1.txt", "a maze"), second[1]]
    shard("train/0.tar", members)
    root = shard("test/0.tar", first)
    source = open_source("webdataset", TASK, str(root), {})
    assert source.labels("train").tolist() == [1, 2]
    assert brightness(source, "train", [0, 1]) == [1, 2]


def test_folder_of_the_hubs_name(shard, sample) -> None:
    task = find_task("smallnorb_azi")
    for split in ("train", "test"):
        root = shard(f"wds_vtab-smallnorb_label_azimuth/{split}/0.tar", sample("s0", 9, 17))
    assert open_source("webdataset", task, str(root), {}).labels("test").tolist() == [17]
    with pytest.raises(SourceUnavailable, match="no tar files of kitti"):
        open_source("webdataset", find_task("kitti"), str(root), {})


def test_bad_samples(shard, sample) -> None:
    good = sample("s0", 1, 0)
    members = [
        *good,
        ("s1.webp", good[0][1]),
        ("s2.cls", "1"),
        *sample("s3", 4, "cat"),
        *sample("s4", 5, 3),
        *good,
    ]
    shard("train/0.tar", members)
    root = shard("test/0.tar", [])
    source = open_source("webdataset", TASK, str(root), {})
    assert source.labels("train").tolist() == [0, -1, 1, -1, 3, 0]
    bad = {row.index: row.reason for row in check_rows(source, TASK, "train")}
    assert bad == {
        1: "no .cls file with a non-negative integer",
        2: "no image, or several: expected one",
        3: "no .cls file with a non-negative integer",
        4: "label 3 is out of range: expected 0 to 2",
        5: "key occurs twice, first as row 0",
    }
    assert [row.reason for row in check_rows(source, TASK, "test")] == ["the split has no images"]


def test_a_cut_off_shard(shard, sample, tmp_path: Path) -> None:
    root = shard("train/0.tar", [*sample("s0", 1, 0), *sample("s1", 2, 0)])
    path = tmp_path / "train" / "0.tar"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(UserError, match=r"train/0\.tar is not a whole tar file"):
        open_source("webdataset", TASK, str(root), {}).labels("train")
    whole = shard("train/0.tar", [*sample("s0", 1, 0), *sample("s1", 2, 0)]) / "train" / "0.tar"
    content = whole.read_bytes()
    with tarfile.open(whole) as archive:
        second = archive.getmember("s1.webp").offset
    # Both leave what the standard library takes for a shorter archive.
    for damaged in (content[:second], content[:second] + b"\x07" * 512 + content[second + 512 :]):
        whole.write_bytes(damaged)
        with pytest.raises(UserError, match=f"not a whole tar file: .*end mark at byte {second}"):
            open_source("webdataset", TASK, str(root), {}).labels("train")
    path.write_text("<html>404</html>" * 100)
    with pytest.raises(UserError, match=r"train/0\.tar is not a whole tar file"):
        open_source("webdataset", TASK, str(root), {}).labels("train")


def test_hidden_companions_of_macos_and_paths_from_a_dot(shard, sample) -> None:
    members = [(f"{folder}{name}", data) for folder in ("./._", "./") for name, data in sample("s0", 7, 1)]
    shard("test/0.tar", members)
    root = shard("train/0.tar", [*members, ("__MACOSX/._s1.webp", b"x")])
    source = open_source("webdataset", TASK, str(root), {})
    assert source.labels("train").tolist() == [1]
    assert brightness(source, "train", [0]) == [7]


def test_keys_with_dots_and_parts_of_several_words(shard, sample) -> None:
    shard("train/0.tar", [*sample("img.0001", 1, 0), *sample("img.0002", 2, 1)])
    root = shard("test/0.tar", [("s0.input.webp", sample("", 9, 0)[0][1]), ("s0.cls", "2")])
    source = open_source("webdataset", TASK, str(root), {})
    assert source.labels("train").tolist() == [0, 1]
    assert brightness(source, "train", [0, 1]) == [1, 2]
    assert source.name("train", 1).endswith("0.tar#img.0002")
    assert source.labels("test").tolist() == [2]
    assert brightness(source, "test", [0]) == [9]


def test_parts_of_other_names(shard, sample) -> None:
    (_, left), (_, right) = (sample("", value, 0)[0] for value in (1, 2))
    members = [("s0.left.webp", left), ("s0.right.webp", right), ("s0.label.txt", "1")]
    root = shard("train/0.tar", members)
    shard("test/0.tar", [("s0.npy", b"1"), ("s0.label.txt", "1")])
    stated = {"image": "right.webp", "label": "label.txt"}
    source = open_source("webdataset", TASK, str(root), stated)
    assert source.labels("train").tolist() == [1]
    assert brightness(source, "train", [0]) == [2]
    with pytest.raises(SourceUnavailable, match=r"no images in the test shards of .* got label\.txt, npy; s"):
        open_source("webdataset", TASK, str(root), {}).labels("test")
