"""The methods on frozen features behind scikit-learn's interface."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from h2t.backbones.loading import Backbone
from h2t.backbones.tap_reader import feature_layout
from h2t.errors import UserError
from h2t.extraction import extract_features
from h2t.features import FeatureLayout, default_embedding
from h2t.head2toe import fit, logits
from h2t.hyperparameters import Hyperparameters


class Head2ToeClassifier(ClassifierMixin, BaseEstimator):
    """Head2Toe, or one of the baselines on frozen features, as a classifier of scikit-learn.

    Without a ``backbone``, X is float [n_samples, n_features], the raw features of all taps side by side, and
    ``layout`` says which columns belong to which tap (one tap of all columns if not given). With a
    ``backbone``, X is a sequence of images: encoded, files, or uint8 [height, width, 3]; to search over
    hyperparameters, take ``h2t.extraction.extract_features`` once and give its features instead.

    ``method``: any of ``h2t.methods.METHODS`` that leaves the backbone frozen. ``learning_rate``, ``steps``,
    ``coefficient``, ``keep_fraction`` (F), ``target_size`` (T, used with a backbone) and ``batch_size`` are
    the paper's. ``embedding`` names the tap that ``linear`` uses (default: ``pre_logits``, or the last). Rows
    are shuffled once by ``random_state``, which also draws the first weights.

    After ``fit``: ``classes_``, ``head_`` (an ``h2t.head2toe.Head``), ``layout_``, ``n_features_in_``.
    """

    def __init__(
        self,
        method: str = "head2toe",
        *,
        layout: FeatureLayout | None = None,
        backbone: Backbone | None = None,
        target_size: int = 512,
        learning_rate: float = 0.01,
        steps: int = 500,
        coefficient: float = 1e-5,
        keep_fraction: float = 0.1,
        batch_size: int = 128,
        embedding: str | None = None,
        random_state: int | np.random.RandomState | None = 0,
    ) -> None:
        self.method = method
        self.layout = layout
        self.backbone = backbone
        self.target_size = target_size
        self.learning_rate = learning_rate
        self.steps = steps
        self.coefficient = coefficient
        self.keep_fraction = keep_fraction
        self.batch_size = batch_size
        self.embedding = embedding
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> "Head2ToeClassifier":
        """Keep features and train the head. Raises UserError for parameters that cannot be used."""
        features, y = self._checked(X, y)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise UserError(f"expected labels of at least 2 classes, got {len(self.classes_)} class")
        self.layout_ = self._layout(features.shape[1])
        random = check_random_state(self.random_state)
        order = random.permutation(len(labels))
        (self.head_,) = fit(
            features[order],
            labels[order].astype(np.int64),
            self.layout_,
            [self._hyperparameters()],
            n_classes=len(self.classes_),
            embedding=default_embedding(self.layout_.taps) if self.embedding is None else self.embedding,
            seeds=[int(random.randint(2**31 - 1))],
            batch_size=self.batch_size,
        )
        return self

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

    def _features(self, images: Sequence[Any]) -> np.ndarray:
        assert self.backbone is not None
        return extract_features(self.backbone, images, self.target_size)

    def _layout(self, n_features: int) -> FeatureLayout:
        if self.backbone is not None:
            return feature_layout(self.backbone, self.target_size)
        layout = self.layout or FeatureLayout(("features",), (n_features,))
        if layout.n_features != n_features:
            raise UserError(f"expected X with the layout's {layout.n_features} features, got {n_features}")
        return layout

    def _hyperparameters(self) -> Hyperparameters:
        return Hyperparameters(
            self.method,
            self.target_size,
            self.learning_rate,
            self.steps,
            self.coefficient,
            self.keep_fraction,
        )
