"""The files beside cluster.yaml that other clusters need, checked against what their readers require."""

import re
import shlex
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from pipelines.cli import app, shipped_recipes

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "pipelines" / "deploy"


def job() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "rayjob.yaml").read_text())


def test_the_job_has_what_the_operator_requires() -> None:
    """The fields that KubeRay documents as required, and no other where a slip would be silent."""
    content = job()
    assert (content["apiVersion"], content["kind"]) == ("ray.io/v1", "RayJob")
    spec = content["spec"]
    assert set(spec) <= {
        "entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit", "rayClusterSpec",
        "activeDeadlineSeconds", "submissionMode", "runtimeEnvYAML", "suspend", "entrypointNumCpus",
    }  # fmt: skip
    assert spec["shutdownAfterJobFinishes"]
    cluster = spec["rayClusterSpec"]
    assert set(cluster) <= {
        "rayVersion", "headGroupSpec", "workerGroupSpecs", "enableInTreeAutoscaling", "autoscalerOptions",
    }  # fmt: skip
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        assert isinstance(group["rayStartParams"], dict)
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        (container,) = group["template"]["spec"]["containers"]
        assert {"name", "image", "resources"} <= set(container)
        assert container["resources"]["requests"] == container["resources"]["limits"]
        volumes = {volume["name"] for volume in group["template"]["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] == 0
        assert group["maxReplicas"] > 0
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert limits["nvidia.com/gpu"] == "1"


def test_the_job_runs_a_command_that_there_is() -> None:
    program, command, recipe, *_ = shlex.split(job()["spec"]["entrypoint"])
    assert program == "h2t"
    assert command in {
        info.name or info.callback.__name__ for info in app.registered_commands if info.callback
    }
    assert recipe in shipped_recipes()


def test_job_and_image_have_the_ray_and_the_python_that_the_package_runs_on() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    found = re.search(r"^FROM rayproject/ray:([\d.]+)-py(\d)(\d+)-gpu$", text, re.MULTILINE)
    assert found
    ray, major, minor = found.groups()
    assert ray == job()["spec"]["rayClusterSpec"]["rayVersion"] == version("ray")
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert f">={major}.{minor}" == wanted


def test_the_image_copies_files_that_there_are_and_all_that_the_package_needs() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    instructions = [line.split()[0] for line in lines if line and not line.startswith("#")]
    assert instructions[0] == "FROM"
    assert set(instructions) <= {"FROM", "COPY", "RUN"}
    copied = {
        name
        for line in lines
        if line.startswith("COPY")
        for name in line.split()[1:-1]
        if not name.startswith("--")
    }
    assert all((ROOT / name).exists() for name in copied)
    assert copied == {"pyproject.toml", "README.md", "LICENSE", "h2t", "pipelines"}
