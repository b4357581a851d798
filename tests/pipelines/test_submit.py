"""A job submitted to a real cluster of two nodes (two Ray nodes on this machine, on loopback alone)."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from tests.pipelines.conftest import small_config, write_task

# Ray listens on every interface, so the cluster lives in a network namespace that has loopback only.
NAMESPACE = ["unshare", "--user", "--map-root-user", "--net", "bash", "-euc"]
SCRIPT = """
ip link set lo up
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | base64 | tr -d '=/+')
start="ray start --block --num-cpus=2 --object-store-memory=300000000 --disable-usage-stats"
$start --head --port=6399 --dashboard-port=8299 --temp-dir=$SOCKETS/head >$SCRATCH/head.log 2>&1 &
head=$!
trap 'kill $head $worker 2>/dev/null; wait' EXIT
worker=
until grep -q 'runtime started' $SCRATCH/head.log; do kill -0 $head; sleep 0.2; done
$start --address=127.0.0.1:6399 --temp-dir=$SOCKETS/worker >$SCRATCH/worker.log 2>&1 &
worker=$!
until grep -q 'runtime started' $SCRATCH/worker.log; do kill -0 $worker; sleep 0.2; done
export RAY_ADDRESS=http://127.0.0.1:8299
ray job submit -- $PYTHON -m pipelines run $SCRATCH/recipe.yaml --run-dir $SCRATCH/run
"""


def namespaces_are_allowed() -> bool:
    probe = [*NAMESPACE, "ip link set lo up"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not namespaces_are_allowed(), reason="needs unprivileged network namespaces")
@pytest.mark.timeout(400)
@pytest.mark.slow
def test_a_submitted_job_runs_on_two_nodes(tmp_path: Path, short_folder: str) -> None:
    write_task(tmp_path, "first")
    config = small_config(tmp_path, ("first",), resources={"actors": 2})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    environment = {
        **os.environ,
        "SCRATCH": str(tmp_path),
        "SOCKETS": short_folder,
        "PYTHON": sys.executable,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [*NAMESPACE, SCRIPT], env=environment, capture_output=True, text=True, timeout=380, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "succeeded" in done.stdout
    assert len(pd.read_parquet(tmp_path / "run" / "results")) == 10
    assert (tmp_path / "run" / "report" / "index.html").is_file()
