"""The methods that are compared, as data, and their search spaces (Sections 3 and 4, Appendix A).

A new method on frozen features is a row of ``METHODS``, with a rule in ``h2t/selection.py`` or a regularizer
in ``h2t/heads`` if it needs a new one. No other code knows a method by its name.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Literal, Protocol

from h2t.errors import UserError, unknown
from h2t.heads.spec import Normalization, Regularizer
from h2t.hyperparameters import Hyperparameters


@dataclass(frozen=True)
class Method:
    """A method: which features its head reads, how they are chosen, and what else is trained.

    ``title`` is the one in tables. ``features`` "kept" are those that score highest by the rule
    ``selection`` of ``h2t.selection``: if ``scored``, of WEIGHT_RULES, by the weights of a first training on
    all features with ``regularizer``; else of DATA_RULES, by the training images. ``coefficients`` names the
    list of the recipe's grid for the regularizer.

    ``normalization`` of the features (Section 3.3). That of each feature is by its mean and variance over the
    training images.

    ``solver``: of ``h2t.heads.solvers.SOLVERS``, for a head that is solved for and not trained; it is tried
    with each of ``solver_coefficients``. Where features are "kept", its weights on all of them, times the
    features' standard deviations, are the weights that score.

    ``trains_backbone``: from random weights unless ``pretrained``, and on what the method ``builds_on``
    keeps, if given. ``best_of``: cross-validation takes the best of these methods; nothing else is trained.
    """

    name: str
    title: str
    features: Literal["embedding", "all", "kept"]
    regularizer: Regularizer | None = None
    selection: str | None = None
    scored: bool = True
    coefficients: Literal["coefficient", "head2toe_coefficient", "layergroup_coefficient"] = "coefficient"
    normalization: Normalization = "unit"
    solver: str | None = None
    solver_coefficients: tuple[float, ...] = (0.0,)
    trains_backbone: bool = False
    pretrained: bool = True
    builds_on: str | None = None
    best_of: tuple[str, ...] = ()

    @property
    def by_tap(self) -> bool:
        """Whether it reads features tap by tap, beginning with their products."""
        return self.solver == "tap_kernels"


LOGISTIC = tuple(10.0**power for power in range(-5, 7))
"""Penalties of logistic regression: the inverses of 1e-6 to 1e5, which protocols of CLIP and DINO sweep."""
NEIGHBOURS = (1.0, 5.0, 10.0, 20.0, 50.0)
"""Numbers of nearest neighbours."""
ROUNDS = (0.0, 1.0, 2.0, 4.0, 8.0)
"""How often a mixture of tap kernels is reweighted by feature."""

_kept = partial(Method, features="kept", regularizer="l21", coefficients="head2toe_coefficient")
_by_data = partial(Method, features="kept", scored=False)
_finetuned = partial(Method, features="embedding", trains_backbone=True)

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("linear", "Linear", "embedding"),
        Method("prototype", "Prototype", "embedding", solver="prototype"),
        Method("knn", "k-NN", "embedding", solver="knn", solver_coefficients=NEIGHBOURS),
        Method("ridge", "Ridge", "embedding", solver="ridge"),
        Method("logistic", "Logistic", "embedding", solver="logistic", solver_coefficients=LOGISTIC),
        Method("all_prototype", "+All-Prototype", "all", solver="prototype"),
        Method("all_knn", "+All-k-NN", "all", solver="knn", solver_coefficients=NEIGHBOURS),
        Method("all_ridge", "+All-Ridge", "all", solver="ridge"),
        Method("all_logistic", "+All-Logistic", "all", solver="logistic", solver_coefficients=LOGISTIC),
        Method("tap_kernels", "Tap kernels", "all", solver="tap_kernels", solver_coefficients=ROUNDS),
        Method("tap_kernels_kept", "Tap kernels, kept", "kept", selection="score", solver="tap_kernels",
               solver_coefficients=ROUNDS[1:2]),
        Method("all", "+All", "all"),
        Method("all_l2", "+All-l2", "all", "l2"),
        Method("all_l1", "+All-l1", "all", "l1"),
        Method("all_l21", "+All-l2,1", "all", "l21"),
        _kept("head2toe", "Head2Toe", selection="score"),
        _kept("head2toe_layerwise", "Layer-wise", selection="tap_mean"),
        _kept(
            "head2toe_layergroup", "Layer-wise (group)", selection="tap_norm", regularizer="layergroup",
            coefficients="layergroup_coefficient",
        ),
        _kept("head2toe_per_feature", "Head2Toe, each normalised", selection="score",
              normalization="per_feature"),
        _kept("head2toe_unnormalised", "Head2Toe, not normalised", selection="score", normalization="none"),
        _by_data("random_features", "Random features", selection="random"),
        _by_data("variance_features", "By variance", selection="variance"),
        _by_data("f_test_features", "By F-test", selection="f_test"),
        _by_data("mutual_information_features", "By mutual information", selection="mutual_information"),
        _by_data("extra_trees_features", "By extra trees", selection="extra_trees"),
        _finetuned("scratch", "Scratch", pretrained=False),
        _finetuned("finetune", "Fine-tuning"),
        _kept("head2toe_ft", "Head2Toe-FT", selection="score", trains_backbone=True, builds_on="head2toe"),
        _kept(
            "head2toe_ft_plus", "Head2Toe-FT+", selection="score", trains_backbone=True,
            best_of=("head2toe", "head2toe_ft"),
        ),
    )
}  # fmt: skip

PAPERS = (
    "linear", "all_l2", "all_l1", "all_l21", "head2toe", "head2toe_layerwise", "head2toe_layergroup",
    "scratch", "finetune", "head2toe_ft", "head2toe_ft_plus",
)  # fmt: skip
"""The methods that the paper compares, in its tables or in Section 4.3."""


def check_depth(max_depth: float | None, methods: Iterable[str]) -> None:
    """Raise UserError for methods on the embedding, which comes last, where a pass is to end earlier."""
    late = [name for name in methods if METHODS[name].features == "embedding"]
    if max_depth is not None and max_depth < 1 and late:
        raise UserError(
            f"max_depth {max_depth:g}: {', '.join(late)} reads the embedding, where a forward pass ends; "
            "expected methods on all taps, such as head2toe, or no max_depth"
        )


class Grid(Protocol):
    """The values that a search space combines, as a recipe gives them."""

    @property
    def target_size(self) -> Sequence[int]: ...
    @property
    def learning_rate(self) -> Sequence[float]: ...
    @property
    def steps(self) -> Sequence[int]: ...
    @property
    def coefficient(self) -> Sequence[float]: ...
    @property
    def head2toe_coefficient(self) -> Sequence[float]: ...
    @property
    def layergroup_coefficient(self) -> Sequence[float]: ...
    @property
    def keep_fraction(self) -> Sequence[float]: ...


def find_method(name: str) -> Method:
    """The method of that name. Raises UserError with the nearest names."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]


def search_space(method: str, grid: Grid) -> list[Hyperparameters]:
    """Every point of a method's search space (Appendix A), leaving out what the method has no use for.

    A method on the embedding gets the first target size only, since the embedding does not depend on it.
    """
    definition = find_method(method)
    return [
        Hyperparameters(method, *point)
        for point in product(
            grid.target_size[:1] if definition.features == "embedding" else grid.target_size,
            grid.learning_rate if definition.solver is None else [0.0],
            grid.steps if definition.solver is None else [0],
            getattr(grid, definition.coefficients)
            if definition.regularizer
            else definition.solver_coefficients,
            grid.keep_fraction if definition.features == "kept" else [1.0],
        )
    ]
