"""All 19 tasks from a VTAB-1k archive with real files to the 19-column table, by the shipped recipe."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from rich.console import Console

from h2t.tasks import VTAB_1K, Task
from pipelines.cluster import Cluster
from pipelines.recipe import load_config
from pipelines.run_directory import RunDirectory
from tests.pipelines.conftest import output, run_all

pytestmark = pytest.mark.usefixtures("cluster")
RECIPE = Path(__file__).parents[2] / "pipelines" / "recipes" / "vtab1k-resnet50.yaml"
SMALL = [
    "backbone={name: test_efficientnet, weights: random, image_size: 32}",
    "methods=[linear, head2toe]",
    "grid.target_size=[16]",
    "grid.learning_rate=[0.1]",
    "grid.steps=[3]",
    "grid.head2toe_coefficient=[1e-5]",
    "grid.keep_fraction=[0.2]",
    "seeds=[0]",
    "resources={}",
]


def write_archive_task(root: Path, task: Task, generator: np.random.Generator) -> None:
    """Eight plus two training and four test images, lossy JPEG or PNG, as people have them."""
    ending = "jpg" if task.group == "natural" else "png"
    for split, count in (("train800", 8), ("val200", 2), ("test", 4)):
        folder = root / task.folder / "images" / split
        folder.mkdir(parents=True)
        lines = []
        for number in range(count):
            height, width = generator.integers(20, 60, 2)
            shape = (height, width) if task.group == "structured" else (height, width, 3)
            Image.fromarray(generator.integers(0, 256, shape, np.uint8)).save(
                folder / f"{number:06d}.{ending}"
            )
            lines.append(f"images/{split}/{number:06d}.{ending} {number % task.n_classes}")
        (root / task.folder / f"{split}.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, generator = tmp_path_factory.mktemp("vtab") / "vtab-1k", np.random.default_rng(0)
    for task in VTAB_1K:
        write_archive_task(root, task, generator)
    return root


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_recipe_ends_in_the_table_of_19_tasks(
    archive: Path, tmp_path: Path, console: Console, cluster: Cluster
) -> None:
    config = load_config(RECIPE, [*SMALL, f"images.root={archive}"])
    run = RunDirectory(str(tmp_path))
    run_all(config, run, console)
    results = run.read_frame(run.names("results", recursive=True))
    assert set(results["task"]) == {task.name for task in VTAB_1K}
    assert set(results["fold_scheme"]) == {"archive"}
    assert len(results) == 19 * 2
    columns = pd.read_csv(tmp_path / "report" / "table1.csv").columns
    assert {task.name for task in VTAB_1K} <= set(columns)
    titles = run.read("report/table1.md").decode()
    assert all(task.title in titles for task in VTAB_1K)
    page = run.read("report/index.html").decode()
    assert "lossy JPEG" in page
    assert "Head2Toe" in output(console)
