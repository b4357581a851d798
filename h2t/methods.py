"""The methods that are compared, as data, and their search spaces (Sections 3 and 4, Appendix A)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from h2t.errors import unknown
from h2t.heads.spec import Regularizer
from h2t.hyperparameters import Hyperparameters


@dataclass(frozen=True)
class Method:
    """What a method trains, on which features and with which regularizer; ``title`` is the paper's."""

    name: str
    title: str
    features: Literal["embedding", "all", "selected"]
    regularizer: Regularizer | None = None
    trains_backbone: bool = False


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("linear", "Linear", "embedding"),
        Method("all_l2", "+All-l2", "all", "l2"),
        Method("all_l1", "+All-l1", "all", "l1"),
        Method("all_l21", "+All-l2,1", "all", "l21"),
        Method("head2toe", "Head2Toe", "selected", "l21"),
        Method("scratch", "Scratch", "embedding", trains_backbone=True),
        Method("finetune", "Fine-tuning", "embedding", trains_backbone=True),
        Method("head2toe_ft", "Head2Toe-FT", "selected", "l21", trains_backbone=True),
        Method("head2toe_ft_plus", "Head2Toe-FT+", "selected", "l21", trains_backbone=True),
    )
}


def find_method(name: str) -> Method:
    """The method of that name. Raises UserError with the nearest names."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]


def search_space(
    method: str,
    *,
    target_sizes: Sequence[int],
    learning_rates: Sequence[float],
    steps: Sequence[int],
    coefficients: Sequence[float],
    keep_fractions: Sequence[float],
) -> list[Hyperparameters]:
    """Every point of a method's search space (Appendix A), leaving out what the method has no use for.

    A method on the embedding gets the first target size only, since the embedding does not depend on it.
    """
    found = find_method(method)
    return [
        Hyperparameters(method, *point)
        for point in product(
            target_sizes[:1] if found.features == "embedding" else target_sizes,
            learning_rates,
            steps,
            coefficients if found.regularizer else [0.0],
            keep_fractions if found.features == "selected" else [1.0],
        )
    ]
