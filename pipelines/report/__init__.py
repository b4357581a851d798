"""Stage 5: result rows to tables, figures and one page, in the run directory's ``report/``."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from h2t.costs import BackboneCost
from h2t.errors import UserError
from h2t.methods import METHODS
from pipelines.cluster import Cluster
from pipelines.config import Config, fingerprint
from pipelines.extract import package_versions, read_manifest
from pipelines.report.page import write_report
from pipelines.report.terminal import print_table
from pipelines.run_directory import RunDirectory
from pipelines.task_data import TaskData, backbone_folder

__all__ = ["report"]


def report(
    config: Config, works: Sequence[TaskData], run: RunDirectory, cluster: Cluster, console: Console
) -> None:
    """Stage 5: tables and figures of the tasks of this recipe, from the files of the other stages."""
    frames = {
        stage: run.read_frame(
            name for work in works for name in run.names(work.folder(stage), recursive=True)
        )
        for stage in ("results", "selected", "kept", "bad_rows", "trials")
    }
    if frames["results"].empty:
        raise UserError(f"no results in {run.uri}: run the evaluate stage first")
    names = write_report(
        run,
        frames["results"],
        frames["selected"],
        frames["kept"],
        frames["bad_rows"],
        _provenance(config, works),
        trials=frames["trials"],
        costs={backbone_folder(config): BackboneCost(**read_manifest(works[0], run)["cost"])},
    )
    print_table(frames["results"], console)
    console.print(f"{'report':<9} {len(names)} files; open {run.uri}/report/index.html")


def _provenance(config: Config, works: Sequence[TaskData]) -> dict[str, Any]:
    return {
        "recipe": config.name,
        "fingerprint": fingerprint(config),
        "backbone": config.backbone.model_dump(exclude_none=True),
        "images": {work.task.name: work.source.provenance() for work in works},
        "grid": config.grid.model_dump(),
        "cross-validation": config.cross_validation.model_dump(),
        "seeds": config.seeds,
        "fine-tuning": config.finetune.model_dump() if _trains_backbones(config) else "none",
        "packages": package_versions(),
    }


def _trains_backbones(config: Config) -> bool:
    return any(METHODS[method].trains_backbone for method in config.methods)
