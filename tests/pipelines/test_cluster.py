"""The cluster file for Ray's launcher, checked with Ray's own validation."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from h2t.errors import UserError
from pipelines.cluster import Cluster, reserved_memory
from pipelines.connection import _temporary_folder, connect, object_store_bytes, object_store_folder
from pipelines.feature_cache import matrices_kept
from pipelines.machine import GIB

CLUSTER = Path(__file__).parents[2] / "cluster.yaml"


def test_ray_accepts_the_cluster_file() -> None:
    config = yaml.safe_load(CLUSTER.read_text())
    validate_config(prepare_config(config))
    worker = config["available_node_types"]["gpu_worker"]
    assert worker["min_workers"] == 0
    assert worker["resources"]["GPU"] >= 1
    assert "GPU" not in config["available_node_types"][config["head_node_type"]]["resources"]


def test_every_node_has_the_token_that_ray_asks_for() -> None:
    config = yaml.safe_load(CLUSTER.read_text())
    assert config["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    for side in ("head", "worker"):
        start = next(line for line in config[f"{side}_start_ray_commands"] if "ray start" in line)
        assert start.startswith("RAY_AUTH_MODE=token ")


def test_the_validation_is_a_real_one() -> None:
    config = yaml.safe_load(CLUSTER.read_text())
    with pytest.raises(Exception, match="unknown_key"):
        validate_config(prepare_config({**config, "unknown_key": 1}))


def test_only_the_noise_is_kept_from_standard_error_and_nothing_is_held_back() -> None:
    """In a process that is killed inside, as a real one may be."""
    code = """
import os, signal
from pipelines.connection import without_line
with without_line("object store"):
    os.write(2, b"1\\nactor has arguments in the object store\\n2\\n")
os.write(2, b"object store\\n")
with without_line("object store"):
    os.write(2, b"3\\n")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert done.stderr == "1\n2\nobject store\n3\n"


def test_the_address_of_a_dashboard_is_named_for_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    message = "the environment variable RAY_ADDRESS is 'http://127.0.0.1:8265', which is for `ray job submit"
    with pytest.raises(UserError, match=message):
        connect()
    with pytest.raises(UserError, match="--address is 'https://cluster', which is for `ray job submit"):
        connect("https://cluster")


@pytest.mark.slow
def test_ray_starts_where_the_temporary_folder_has_a_long_path(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 97)
    folder.mkdir()
    code = (
        "from pipelines.connection import connect; import ray; connect(); print(ray.get(ray.put('started')))"
    )
    environment = {**os.environ, "TMPDIR": str(folder), "RAY_TMPDIR": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert "started" in done.stdout


def test_a_temporary_folder_that_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "x" * 97)
    assert _temporary_folder() == "/tmp/ray"
    monkeypatch.setattr("pipelines.connection.SHORT_FOLDER", "/nowhere")
    with pytest.raises(UserError, match="at most 40 characters, got 102; set RAY_TMPDIR to a shorter one"):
        _temporary_folder()
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/short")
    assert _temporary_folder() is None


@pytest.mark.slow
def test_workers_of_a_strict_run_compute_with_fixed_instructions() -> None:
    code = """
import ray
from h2t.device import STRICT
from pipelines.connection import connect
connect(environment=STRICT)
@ray.remote
def capability():
    import torch
    return torch.backends.cpu.get_cpu_capability()
print(ray.get(capability.remote()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split()[-1] == "AVX2"


def test_the_object_store_has_room_for_what_is_wanted_as_far_as_the_machine_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=32 * GIB))
    assert [object_store_bytes(matrix * GIB) for matrix in (0, 3, 4, 8)] == [GIB, 7 * GIB, 5 * GIB, 9 * GIB]
    assert object_store_bytes(100 * GIB) == 16 * GIB  # half of the memory


def test_without_shared_memory_the_object_store_lies_on_a_disk_with_room(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    free = {"/dev/shm": 20 * GIB, str(tmp_path): 30 * GIB}
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free[folder]))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr("pipelines.connection.LONGEST_FOLDER", 1000)
    assert object_store_folder(10 * GIB) == ""
    free["/dev/shm"] = 64 << 20  # as in a container that nobody told otherwise
    assert object_store_folder(10 * GIB) == str(tmp_path)
    free[str(tmp_path)] = 5 * GIB
    with pytest.raises(UserError, match=r"no room in /dev/shm .*--shm-size.* 10\.0 GiB of room .* got 5\.0"):
        object_store_folder(10 * GIB)


def test_work_that_no_machine_has_the_memory_for_is_refused() -> None:
    cluster = Cluster(4, 0, 1, True, 4, memory_bytes=8 * GIB)
    assert reserved_memory(cluster, 100 << 20, "a trial") == 0
    assert reserved_memory(cluster, 7 * GIB, "a trial") == 7 * GIB
    with pytest.raises(UserError, match=r"^a trial takes 9\.0 GiB .* 8\.0 are free .*precision: float16"):
        reserved_memory(cluster, 9 * GIB, "a trial")
    elsewhere = replace(cluster, local=False)  # to which larger nodes may come
    assert reserved_memory(elsewhere, 9 * GIB, "a trial") == 9 * GIB


@pytest.mark.parametrize(("store", "kept"), [(1.5, 1), (2.2, 2), (100, 2)])
def test_matrices_stay_as_far_as_the_store_holds_them(store: float, kept: int) -> None:
    assert matrices_kept(1 << 30, int(store * 2**30)) == kept


def test_a_matrix_larger_than_the_store_is_one_message() -> None:
    with pytest.raises(
        UserError, match=r"takes 6.3 GiB, the object store has 1.0: start Ray with a larger one"
    ):
        matrices_kept(4 * 1000 * 1_688_808, 1 << 30)
