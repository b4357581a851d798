"""A node that joins a cluster in mid-run gets work, in Ray Data's pool of actors and in Tune's trials."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from pipelines.cluster import Cluster
from pipelines.config import Resources
from pipelines.run_directory import RunDirectory
from pipelines.shard_stream import actor_pool
from tests.pipelines.conftest import result_rows, run_all, small_config, write_task


def test_a_pool_grows_on_a_cluster_alone_and_where_no_number_is_stated() -> None:
    here, there = (Cluster(4, 0, 1, local, 2) for local in (True, False))
    sizes = [
        (pool.min_size, pool.max_size)
        for cluster, resources, n_units in (
            (here, Resources(), 40), (there, Resources(), 40), (there, Resources(), 1),
            (there, Resources(actors=2), 40),
        )
        for pool in [actor_pool(cluster, resources, 2, n_units)]
    ]  # fmt: skip
    assert sizes == [(2, 2), (2, 40), (1, 1), (2, 2)]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_node_that_joins_in_mid_run_gets_work_of_both_kinds(
    tmp_path: Path, cluster: Cluster, short_folder: str
) -> None:
    write_task(tmp_path / "images", "first", n_train=240)
    config = small_config(
        tmp_path / "images", ("first",), methods=["linear", "head2toe"],
        resources={"shard_size": 4, "actors": None, "concurrent_trials": None, "points_per_trial": 1},
    )  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    variables = {
        **os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "RAY_TMPDIR": short_folder,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
    }  # fmt: skip
    variables.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.pipelines.joining", str(tmp_path)],
        env=variables, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    for stage, n_units in (("extract", 60), ("sweep", 10)):  # shards, and jobs of some of the 20 trials
        nodes = [path.read_text() for path in (tmp_path / stage).iterdir()]
        assert len(nodes) >= n_units, stage
        assert (tmp_path / f"{stage}-joined").read_text() in nodes, stage
    undisturbed = RunDirectory(str(tmp_path / "undisturbed"))
    run_all(config, undisturbed)
    found = result_rows(RunDirectory(str(tmp_path / "run")))
    pd.testing.assert_frame_equal(found, result_rows(undisturbed))
