"""What a study that needs training is: which variants it compares on a task, or which recipes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from h2t.features import FeatureLayout
from h2t.hyperparameters import Hyperparameters
from pipelines.config import Config
from pipelines.scope import EVERYTHING, Scope
from pipelines.task_data import TaskData


@dataclass(frozen=True)
class Variant:
    """A way of adapting to a task that a study tries.

    Of ``points`` the cross-validation chooses one, where there are several. ``series`` and ``x`` say where
    the result stands in a figure. ``reference``: the variant that it is compared with, "" for none.
    """

    name: str
    points: tuple[Hyperparameters, ...]
    scope: Scope = EVERYTHING
    series: str = ""
    x: float = 0.0
    reference: str = ""


@dataclass(frozen=True)
class Facts:
    """What is known of a task when its variants are listed.

    ``layouts``: of its features, by target size; ``chosen``: task -> method -> what cross-validation chose,
    of all tasks of the run.
    """

    task: TaskData
    layouts: Mapping[int, FeatureLayout]
    embedding: str
    chosen: Mapping[str, Mapping[str, Hyperparameters]]

    @property
    def config(self) -> Config:
        """The recipe."""
        return self.task.config

    @property
    def target_size(self) -> int:
        """Of the recipe's, the one nearest to the width of the embedding (Section 3.2)."""
        some = next(iter(self.layouts.values()))
        width = dict(zip(some.taps, some.widths, strict=True))[self.embedding]
        return min(self.layouts, key=lambda size: (abs(size - width), size))

    def points(self, method: str, target_size: int | None = None) -> list[Hyperparameters]:
        """The points of a method's search space, of one target size if given."""
        points = self.config.search_space(method)
        return [point for point in points if target_size in (None, point.target_size)]


@dataclass(frozen=True)
class Study:
    """A study of heads on the run's own features; ``needs``: methods whose choices it builds on."""

    variants: Callable[[Facts], list[Variant]]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class RecipeStudy:
    """A study of other features: ``methods`` with other settings of the recipe's backbone.

    ``backbones``: the changed settings of that section for each variant, by its name; ``needs``: methods of
    the recipe that they are compared with.
    """

    backbones: Callable[[Config], Mapping[str, Mapping[str, Any]]]
    methods: tuple[str, ...] = ("head2toe",)
    needs: tuple[str, ...] = ("head2toe",)
