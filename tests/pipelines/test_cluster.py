"""The cluster file for Ray's launcher, checked with Ray's own validation."""

import os
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from pipelines.cluster import without_lines

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


def test_only_the_noise_is_kept_from_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with without_lines(b"object store"):
            os.write(2, b"1\nactor has arguments in the object store\n2\n")
            assert capfd.readouterr().err == ""
            raise ValueError("3")

    with pytest.raises(ValueError, match="3"):
        fail()
    os.write(2, b"object store\n")
    assert capfd.readouterr().err == "1\n2\nobject store\n"
