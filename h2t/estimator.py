"""The methods on frozen features behind scikit-learn's interface."""

import sys
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from h2t.backbones.aggregation import PAPER, Aggregation
from h2t.backbones.loading import Backbone, load_backbone
from h2t.backbones.tap_reader import feature_layout
from h2t.costs import within_depth
from h2t.device import default_device
from h2t.errors import UserError
from h2t.extraction import extract_features
from h2t.features import FeatureLayout, default_embedding
from h2t.folds import folds
from h2t.head2toe import fit, logits
from h2t.hyperparameters import Hyperparameters
from h2t.methods import check_depth, find_method
from h2t.metrics import accuracy, cross_entropy

SEARCHED = ("learning_rate", "steps", "coefficient", "keep_fraction")


class Head2ToeClassifier(ClassifierMixin, BaseEstimator):
    """Head2Toe, or one of the baselines on frozen features, as a classifier of scikit-learn.

    Without a ``backbone``, X is float [n_samples, n_features], the raw features of all taps side by side, and
    ``layout`` says which columns belong to which tap (one tap of all columns if not given). With a
    ``backbone``, or the name of one and its ``image_size``, X is a sequence of images: encoded, files, or
    uint8 [height, width, 3]; or a pandas column, or a frame of one column, of these. ``aggregation`` says how
    activations become features (None: as in the paper).

    ``method``: any of ``h2t.methods.METHODS`` that leaves the backbone frozen. ``learning_rate``, ``steps``,
    ``coefficient``, ``keep_fraction`` (F), ``target_size`` (T, used with a backbone) and ``batch_size`` are
    the paper's. With ``cv``, a number of folds, the first four may be sequences: one ``fit`` computes the
    features once and chooses by cross-validation. ``max_depth``: the share of the multiply-adds of a forward
    pass after which nothing is read any more, so that predicting needs no more of it (default: all).
    ``embedding`` names the tap that ``linear`` uses (default: ``pre_logits``, or the last). Rows are shuffled
    once by ``random_state``, which also draws the first weights. ``verbose`` 1 prints what it is at.

    After ``fit``: ``classes_``, ``head_`` (an ``h2t.head2toe.Head``), ``layout_``, ``n_features_in_``; with
    ``cv`` also ``best_params_``, ``best_score_`` and ``cv_results_`` (candidate -> mean validation accuracy).
    """

    def __init__(
        self,
        method: str = "head2toe",
        *,
        layout: FeatureLayout | None = None,
        backbone: Backbone | str | None = None,
        image_size: int | None = None,
        target_size: int = 512,
        aggregation: Aggregation | None = None,
        learning_rate: float | Sequence[float] = 0.01,
        steps: int | Sequence[int] = 500,
        coefficient: float | Sequence[float] = 1e-5,
        keep_fraction: float | Sequence[float] = 0.1,
        cv: int | None = None,
        max_depth: float | None = None,
        batch_size: int = 128,
        embedding: str | None = None,
        random_state: int | np.random.RandomState | None = 0,
        verbose: int = 0,
    ) -> None:
        self.method = method
        self.layout = layout
        self.backbone = backbone
        self.image_size = image_size
        self.target_size = target_size
        self.aggregation = aggregation
        self.learning_rate = learning_rate
        self.steps = steps
        self.coefficient = coefficient
        self.keep_fraction = keep_fraction
        self.max_depth = max_depth
        self.batch_size = batch_size
        self.embedding = embedding
        self.cv = cv
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: Any) -> "Head2ToeClassifier":
        """Keep features and train the head. Raises UserError for parameters that cannot be used."""
        self._load_backbone()
        features, y = self._checked(X, y)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise UserError(f"expected labels of at least 2 classes, got {len(self.classes_)} class")
        self.layout_ = self._layout(features.shape[1])
        random = check_random_state(self.random_state)
        order = random.permutation(len(labels))
        features, labels = features[order], labels[order].astype(np.int64)
        candidates = self._candidates()
        options: dict[str, Any] = {
            "n_classes": len(self.classes_),
            "embedding": default_embedding(self.layout_.taps) if self.embedding is None else self.embedding,
            "seeds": [int(random.randint(2**31 - 1))],
            "batch_size": self.batch_size,
        }
        point = candidates[0]
        if self.cv is not None:
            point = self._chosen(features, labels, candidates, options)
        self._say(f"training {self.method} on {len(labels)} rows")
        (self.head_,) = fit(features, labels, self.layout_, [point], **options)
        return self

    def _chosen(
        self,
        features: np.ndarray,
        labels: np.ndarray,
        candidates: list[Hyperparameters],
        options: dict[str, Any],
    ) -> Hyperparameters:
        """The candidate of the highest mean validation accuracy; ties go to the lower loss, the first."""
        assert self.cv is not None
        found: dict[Hyperparameters, list[tuple[float, float]]] = {}
        for number, (rows, validation) in enumerate(folds(len(labels), self.cv), 1):
            self._say(f"fold {number} of {self.cv}: {len(candidates)} candidates")
            for head in fit(features, labels, self.layout_, candidates, rows=rows, **options):
                outputs = logits(head, features[validation])
                score = accuracy(labels[validation], outputs.argmax(1))
                found.setdefault(head.hyperparameters, []).append(
                    (score, cross_entropy(outputs, labels[validation]))
                )
        means = {point: np.mean(found[point], axis=0) for point in candidates}
        best = max(candidates, key=lambda point: (means[point][0], -means[point][1]))
        self.cv_results_ = {point: float(score) for point, (score, _) in means.items()}
        self.best_score_ = self.cv_results_[best]
        self.best_params_ = {name: getattr(best, name) for name in SEARCHED}
        return best

    def _say(self, words: str) -> None:
        if self.verbose:
            sys.stdout.write(f"{type(self).__name__}: {words}\n")

    def _load_backbone(self) -> None:
        """The backbone itself, loaded anew where it is given by its name, with the taps within the depth."""
        if self.max_depth is not None and self.backbone is None:
            raise UserError("max_depth: expected a backbone, whose forward passes it shortens; got features")
        check_depth(self.max_depth, [find_method(self.method).name])
        self.backbone_ = self.backbone
        if isinstance(self.backbone, str):
            self._say(f"loading {self.backbone}")
            self.backbone_ = load_backbone(self.backbone, image_size=self.image_size, device=default_device())
        if isinstance(self.backbone_, Backbone):
            self.backbone_ = within_depth(self.backbone_, self.max_depth)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities float32 [n_samples, n_classes], in the order of ``classes_``."""
        check_is_fitted(self)
        features = self._features(X) if self.backbone is not None else X
        features = validate_data(self, features, reset=False, dtype=np.float32)
        return softmax(logits(self.head_, features), axis=1)

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class of each row, [n_samples]."""
        probabilities = self.predict_proba(X)
        return self.classes_[probabilities.argmax(axis=1)]

    def _checked(self, X: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
        features = self._features(X) if self.backbone is not None else X
        return validate_data(self, features, y, dtype=np.float32)

    def _features(self, images: Any) -> np.ndarray:
        assert isinstance(self.backbone_, Backbone)
        if hasattr(images, "columns"):  # a frame of pandas
            if images.shape[1] != 1:
                raise UserError(f"expected a frame with one column of images, got {images.shape[1]} columns")
            images = images.iloc[:, 0]
        self._say(f"features of {len(images)} images")
        return extract_features(
            self.backbone_, list(images), self.target_size, aggregation=self.aggregation or PAPER
        )

    def _layout(self, n_features: int) -> FeatureLayout:
        if isinstance(self.backbone_, Backbone):
            return feature_layout(self.backbone_, self.target_size, self.aggregation or PAPER)
        layout = self.layout or FeatureLayout(("features",), (n_features,))
        if layout.n_features != n_features:
            raise UserError(f"expected X with the layout's {layout.n_features} features, got {n_features}")
        return layout

    def _candidates(self) -> list[Hyperparameters]:
        """Every combination of the values, those of the last named first."""
        values = {name: np.atleast_1d(getattr(self, name)).tolist() for name in SEARCHED}
        several = [name for name, given in values.items() if len(given) != 1]
        if several and self.cv is None:
            raise UserError(
                f"{several[0]}: expected one value, got {len(values[several[0]])}; or give cv a number"
            )
        if empty := [name for name, given in values.items() if not given]:
            raise UserError(f"{empty[0]}: expected at least one value, got none")
        return [
            Hyperparameters(self.method, self.target_size, *combination)
            for combination in product(*values.values())
        ]
