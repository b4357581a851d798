"""The columns of every table in a run directory, declared once for who writes and who reads them."""

import pyarrow as pa

TEXT, INTEGER, NUMBER = pa.string(), pa.int64(), pa.float64()
_TASK = [("backbone", TEXT), ("task", TEXT), ("group", TEXT)]
_POINT = [
    ("method", TEXT), ("target_size", INTEGER), ("learning_rate", NUMBER), ("steps", INTEGER),
    ("coefficient", NUMBER), ("keep_fraction", NUMBER), ("offset", INTEGER),
]  # fmt: skip
POINT = [name for name, _ in _POINT]
"""The columns that are the fields of ``Hyperparameters``."""

TRIALS = pa.schema([
    *_TASK, *_POINT, ("fold", INTEGER), ("seed", INTEGER), ("status", TEXT), ("validation_accuracy", NUMBER),
    ("validation_loss", NUMBER), ("n_validation", INTEGER), ("n_features", INTEGER), ("n_kept", INTEGER),
    ("seconds", NUMBER), ("train_loss", NUMBER), ("diverged_at", INTEGER), ("fold_scheme", TEXT),
    ("trial", TEXT),
])  # fmt: skip
"""One row per task, method, point of the search space and fold. Accuracies: fractions of 1; losses: nats."""

CHOSEN = pa.schema([
    *_TASK, *_POINT, ("validation_accuracy", NUMBER), ("validation_std", NUMBER), ("validation_loss", NUMBER),
    ("n_folds", INTEGER), ("n_candidates", INTEGER), ("source", TEXT),
])  # fmt: skip
"""One row per task and method; ``source``: the method that one which is the best of others has chosen."""

RESULTS = pa.schema([
    *_TASK, ("method", TEXT), ("seed", INTEGER), ("status", TEXT), ("test_accuracy", NUMBER),
    ("balanced_accuracy", NUMBER), ("macro_f1", NUMBER), ("log_loss", NUMBER), ("brier", NUMBER),
    ("calibration_error", NUMBER), ("n_test", INTEGER), ("n_correct", INTEGER),
    ("n_train", INTEGER), ("n_classes", INTEGER),
    ("n_features", INTEGER), ("n_kept", INTEGER), *_POINT[1:], ("validation_accuracy", NUMBER),
    ("train_loss", NUMBER), ("diverged_at", INTEGER), ("train_seconds", NUMBER),
    ("peak_memory_bytes", INTEGER), ("processor", TEXT), ("threads", INTEGER),
    ("modelled_flops", NUMBER), ("modelled_storage_bytes", INTEGER),
    ("image_source", TEXT), ("preprocessing", TEXT), ("fold_scheme", TEXT), ("weights", TEXT),
    ("fingerprint", TEXT),
])  # fmt: skip
"""One row per task, method and seed; ``fingerprint``: the key of the features."""

_STUDY = [*_TASK, ("study", TEXT), ("variant", TEXT)]

STUDY_CHOSEN = pa.schema([
    *_STUDY, *_POINT, ("validation_accuracy", NUMBER), ("validation_loss", NUMBER), ("n_candidates", INTEGER),
])  # fmt: skip
"""One row per study, task and variant; validation is null where there was nothing to choose."""

STUDY_PREDICTIONS = pa.schema([
    ("backbone", TEXT), ("task", TEXT), ("study", TEXT), ("variant", TEXT), ("seed", pa.int32()),
    ("index", pa.int32()), ("label", pa.int32()), ("prediction", pa.int32()),
])  # fmt: skip
"""One row per study, variant, seed and test image."""

STUDY_RESULTS = pa.schema([
    *_STUDY, ("series", TEXT), ("x", NUMBER), *_POINT, ("seed", INTEGER), ("test_accuracy", NUMBER),
    ("low", NUMBER), ("high", NUMBER), ("reference", TEXT), ("difference", NUMBER),
    ("difference_low", NUMBER), ("difference_high", NUMBER), ("n_test", INTEGER), ("n_correct", INTEGER),
    ("n_train", INTEGER), ("n_classes", INTEGER), ("n_features", INTEGER), ("n_kept", INTEGER),
    ("validation_accuracy", NUMBER), ("fingerprint", TEXT),
])  # fmt: skip
"""One row per study, task, variant and seed.

``series`` and ``x``: where it stands in the study's figure; ``low`` to ``high``: the interval of the
variant's mean accuracy over seeds; ``difference``: of that mean to the reference's, on the same test images;
``n_features``: the candidates.
"""

KEPT = pa.schema([
    *_TASK, ("method", TEXT), ("seed", INTEGER), ("tap", TEXT), ("tap_index", INTEGER),
    ("n_features", INTEGER), ("n_kept", INTEGER), ("kept", pa.list_(pa.int32())),
])  # fmt: skip
"""One row per task, method, seed and tap; ``kept``: which features of the tap, null where all are."""

PREDICTIONS = pa.schema([
    ("backbone", TEXT), ("task", TEXT), ("method", TEXT), ("seed", pa.int32()), ("index", pa.int32()),
    ("label", pa.int32()), ("prediction", pa.int32()), ("probability", pa.float32()),
    ("label_probability", pa.float32()), ("squared_probabilities", pa.float32()),
])  # fmt: skip
"""One row per test image, method and seed; ``h2t.metrics.Scores`` says what the last columns are.

Where the training diverged, the prediction is -1 and the probabilities are NaN.
"""

THUMBNAIL_KINDS = {
    "training": "training images",
    "gained": "Head2Toe right, linear wrong",
    "lost": "linear right, Head2Toe wrong",
}

THUMBNAILS = pa.schema([
    *_TASK, ("kind", TEXT), ("index", INTEGER), ("label", TEXT), ("prediction", TEXT), ("image", pa.binary()),
])  # fmt: skip
"""One row per small image (WebP); ``kind``: of THUMBNAIL_KINDS; ``prediction``: the wrong one of a test
image, by the method that gets it wrong."""

EXPLANATIONS = pa.schema([
    *_TASK, ("method", TEXT), ("seed", INTEGER), ("index", INTEGER), ("label", TEXT), ("prediction", TEXT),
    ("logit", NUMBER), ("bias", NUMBER), ("placeless", NUMBER), ("taps", pa.list_(TEXT)),
    ("parts", pa.list_(NUMBER)), ("image", pa.binary()), ("heat", pa.binary()),
])  # fmt: skip
"""One row per explained test image: what each of ``taps`` adds to the logit of the prediction
(``h2t.explanation``); the image as the backbone sees it, and the same with its heat map (WebP)."""

BAD_ROWS = pa.schema([
    ("backbone", TEXT), ("task", TEXT), ("split", TEXT), ("index", pa.int32()), ("path", TEXT),
    ("reason", TEXT),
])  # fmt: skip
"""One row per image that was left out; of a file that is no row at all the index is -1 and split empty."""
