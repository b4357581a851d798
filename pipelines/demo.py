"""The demo's tasks that can run here: those whose data package is installed."""

from rich.console import Console

from h2t.errors import UserError
from h2t.images.source import SourceUnavailable
from pipelines.config import Config
from pipelines.task_data import open_task

QUICK = ("name=demo-quick", "tasks=[mnist, dsprites_loc]", "cross_validation.n_folds=2", "seeds=[0]")
"""What ``h2t demo --quick`` sets."""

STUDIES = (
    "single-tap", "taps-or-features", "relevance-offset", "transfer-selection", "scaling", "normalisation",
)  # fmt: skip
"""What ``h2t demo --studies`` adds: those that fit into ten minutes on two cores."""


def available_tasks(config: Config, console: Console) -> Config:
    """The recipe without the tasks whose images are not installed; says which, and names licences."""
    available = []
    for task in config.tasks:
        try:
            opened = open_task(config, task.name)
        except SourceUnavailable as error:
            console.print(f"without {task.name}: {error}")
            continue
        available.append(task)
        if opened.task.licence:
            console.print(f"{task.name}: images under {opened.task.licence}")
    if not available:
        raise UserError("no demo task is available; install with pip install 'head2toe-ray[demo]'")
    return config.model_copy(update={"tasks": available})
