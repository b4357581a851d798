"""The studies that need training: every module here declares one, as its ``STUDY``.

``pipelines.variants`` says what that is, ``pipelines/study.py`` trains it, and the module of the same name in
``pipelines/report/studies`` shows it. To add a study, add both and a test; nothing else names it.
"""

import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING

from h2t.errors import UserError, unknown

if TYPE_CHECKING:
    from pipelines.variants import RecipeStudy, Study


IN_EVERY_REPORT = ("gain-by-affinity", "feature-origin", "overlap")
"""The paper's other studies: they need no training."""


def study_names() -> list[str]:
    """The names of all studies that need training, as recipes have them."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def checked_name(name: str) -> str:
    """The name itself. Raises UserError with the nearest names, and for a study that needs no training."""
    if name in IN_EVERY_REPORT:
        raise UserError(f"{name} needs no training: it is a section of every report of a run")
    if name not in study_names():
        raise unknown("study", name, study_names())
    return name


def find_study(name: str) -> "Study | RecipeStudy":
    """The study of that name. Raises UserError with the nearest names."""
    study: Study | RecipeStudy = import_module(f"{__name__}.{checked_name(name).replace('-', '_')}").STUDY
    return study
