"""The content of a run directory: the name and the key of every file; ``schemas.py`` has their columns.

Files lie in ``<kind>/<backbone>/…/<task>/…`` and end in their key, a fingerprint of what is computed:
versions of our semantics, what identifies backbone and images, hyperparameters, seeds. How the work is cut
and where files lie is in no key, so that a change of ``resources`` or of a path recomputes nothing. The
number of images in a forward pass changes features by float32 rounding at most: it is in no key either.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import pandas as pd
import pyarrow as pa

from h2t.backbones.pretrained import weights_identity
from h2t.errors import UserError
from h2t.features import FeatureLayout
from h2t.hyperparameters import Hyperparameters
from h2t.methods import METHODS
from pipelines.config import Config, fingerprint
from pipelines.products import Files, RowFiles, Shard, Trial, TrialFiles
from pipelines.run_directory import RunDirectory
from pipelines.scope import EVERYTHING, Scope, reads_by_tap
from pipelines.task_data import Split, TaskData
from pipelines.variants import Variant

FEATURES_VERSION = 1  # raise it when a change of the code changes the features
HEADS_VERSION = 3  # likewise for heads on frozen features: the trainer, the rules that keep features
GRAMS_VERSION = 1  # likewise for the products of features
FINETUNING_VERSION = 2  # likewise for trained backbones

PREDICTIONS_VERSION = 2  # likewise for what is kept of predictions
KEPT_VERSION = 2  # likewise for what is told of kept features
THUMBNAILS_VERSION = 1  # likewise for the images that the report shows
EXPLANATIONS_VERSION = 1  # likewise for the explained predictions that it shows
STUDY_VERSION = 1  # likewise for the result rows of studies

Kind = Literal["frozen", "finetuned"]
"""Whether the backbone stays as it is or is trained."""


def write_rows(run: RunDirectory, name: str, schema: pa.Schema, rows: Iterable[Mapping[Any, Any]]) -> None:
    """Write rows as a Parquet file of a declared schema."""
    run.write_table(name, pa.Table.from_pylist(list(rows), schema=schema), compression="zstd")


def write_frame(run: RunDirectory, name: str, schema: pa.Schema, frame: pd.DataFrame) -> None:
    """Write a data frame as a Parquet file of a declared schema; what is NaN or not there becomes null."""
    table = pa.Table.from_pandas(frame.reindex(columns=schema.names), schema, preserve_index=False)
    run.write_table(name, table.replace_schema_metadata(), compression="zstd")


def backbone_folder(config: Config) -> str:
    """The backbone's name as it stands in paths and tables."""
    return config.backbone.name.replace("/", "_").replace(":", "_")


def identified_backbone(config: Config) -> dict[str, Any]:
    """The recipe's section with the hash of the weights, so that no others will be taken for them."""
    section = config.backbone
    kind, _, digest = weights_identity(section.name, section.weights, section.sha256).partition(" ")
    content = section.model_dump(mode="json") | {"sha256": digest if kind == "sha256" else None}
    return content if section.second else {name: v for name, v in content.items() if name != "second"}


def task_columns(task: TaskData) -> dict[str, str]:
    """The columns that say which backbone and task a row is of."""
    return {"backbone": backbone_folder(task.config), "task": task.name, "group": task.task.group}


def _folder(task: TaskData, first: str, *parts: str) -> str:
    return "/".join((first, backbone_folder(task.config), *(parts or (task.name,))))


# Keys: what is computed, never how the work is cut or where it lies.


def features_key(task: TaskData, split: Split) -> str:
    """Changes with whatever the features of a split depend on."""
    config = task.config
    backbone = config.backbone.model_dump(mode="json", exclude={"weights", "sha256", "second"})
    weights = weights_identity(config.backbone.name, config.backbone.weights, config.backbone.sha256)
    if second := config.backbone.second:
        backbone["second"] = [second.name, weights_identity(second.name, second.weights, second.sha256)]
    return fingerprint(
        FEATURES_VERSION, backbone, weights, task.image_identity(split), split, config.on_bad_image,
        *([] if config.deterministic == "machine" else [config.deterministic]),
        *([] if config.features.precision == "float32" else [{"precision": config.features.precision}]),
    )  # fmt: skip


def heads_key(task: TaskData, split: Split) -> str:
    """Changes with whatever all heads trained on a split depend on, beside hyperparameters and seed."""
    config = task.config
    return fingerprint(
        HEADS_VERSION, features_key(task, split), config.seed, config.batch_size, config.head_precision,
        task.n_classes,
    )  # fmt: skip


def _point_key(point: Hyperparameters) -> list[Any]:
    """A point with the definition of its method: a change of that makes other heads."""
    return [
        _stated(point),
        {name: v for name, v in _stated(METHODS[point.method]).items() if name != "title"},
    ]


def _stated(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not at their defaults: a new field changes no key."""
    return {f.name: v for f in fields(value) if (v := getattr(value, f.name)) != f.default}


def _folds_key(task: TaskData) -> list[Any]:
    return [task.config.cross_validation.n_folds, task.config.cross_validation.scheme]


# The products of every stage.


def features(task: TaskData, split: Split, target_size: int) -> RowFiles:
    """Features of one split at one target size: a row per image, a list of numbers per tap."""
    folder = _folder(task, "features", f"target-size-{target_size}", task.name, split)
    return _row_files(task, split, folder, features_key(task, split), target_size, "extract")


@dataclass(frozen=True)
class TapToMultiply:
    """A tap, the file of its products, and the forward pass that reads it where no features are stored."""

    task: str
    split: Split
    target_size: int
    tap: int
    n_rows: int
    forward_pass: int
    file: str


def grams(
    task: TaskData, split: Split, target_size: int, layout: FeatureLayout, passes: Sequence[int] = ()
) -> Files:
    """The products of one split's features with each other, a file per tap; ``passes``: those of each."""
    folder = _folder(task, "grams", f"target-size-{target_size}", task.name, split)
    key = fingerprint(GRAMS_VERSION, features_key(task, split))
    units = [
        TapToMultiply(
            task.name, split, target_size, tap, len(task.labels[split]), number,
            f"{folder}/tap-{tap:03d}-{key}.parquet",
        )
        for tap, number in enumerate(passes or [0] * len(layout.taps))
    ]  # fmt: skip
    return Files(folder, {unit.file: unit for unit in units})


def _row_files(task: TaskData, split: Split, folder: str, key: str, tag: int | str, stage: str) -> RowFiles:
    """A table of the rows of a split, which has its labels but for the rows that are bad."""
    labels, bad_rows = task.labels[split], f"{_folder(task, 'bad_rows')}/{split}"
    return RowFiles(folder, key, task.name, split, len(labels), tag, stage, labels, bad_rows)


def bad_rows_file(task: TaskData, shard: Shard) -> str:
    """The list of the bad rows of a shard, if it has some: one, however many tables are made of the rows."""
    key = features_key(task, shard.split)
    return f"{_folder(task, 'bad_rows')}/{shard.split}-{shard.start:06d}-{shard.stop:06d}-{key}.parquet"


def bad_rows(task: TaskData) -> Files:
    """The lists of bad rows, which come with their shards, and that of files which are no rows at all."""
    folder = _folder(task, "bad_rows")
    left_out = f"{folder}/left-out-{fingerprint(list(task.left_out))}.parquet"
    keys = [features_key(task, split) for split in task.sources]
    return Files(folder, {left_out: task.name} if task.left_out else {}, keys)


def manifest(task: TaskData) -> Files:
    """The description of the features of a task: taps, backbone, its costs, images, packages."""
    sizes = sorted(task.config.grid.target_size)
    keys = [features_key(task, split) for split in task.stored_splits]
    folder = _folder(task, "manifests")
    return Files(folder, {f"{folder}/manifest-{fingerprint(keys, sizes)}.json": task.name})


def read_manifest(task: TaskData, run: RunDirectory) -> dict[str, Any]:
    """The content of a task's manifest. Raises UserError where there is none."""
    (name,) = manifest(task).units
    content: dict[str, Any] = run.read_json(required(run, name, "extract"))
    return content


def _frozen_points(config: Config) -> list[Hyperparameters]:
    """The points of all methods on frozen features; those that share the scoring phase stand side by side."""
    methods = [method for method in config.methods if not METHODS[method].trains_backbone]
    points = [point for method in methods for point in config.search_space(method)]
    return sorted(points, key=lambda p: (p.target_size, p.steps, p.learning_rate, p.coefficient))


def _trials_key(task: TaskData) -> str:
    return fingerprint(heads_key(task, task.fold_split), _folds_key(task))


def trials(task: TaskData) -> TrialFiles:
    """The cross-validation of the methods on frozen features, ordered by target size and fold."""
    folder, members = _trials_folder(task), _trials(task, _trials_folder(task), _frozen_points(task.config))
    return TrialFiles(folder, _trials_key(task), members)


def _trials_folder(task: TaskData) -> str:
    return _folder(task, "trials", task.name, "frozen")


def _trials(
    task: TaskData, folder: str, points: Sequence[Hyperparameters], scope: Scope = EVERYTHING
) -> tuple[Trial, ...]:
    """The trials of points on all folds, ordered by target size and fold."""
    context, part = _trials_key(task), [] if scope == EVERYTHING else [_stated(scope)]
    return tuple(
        Trial(
            task.name,
            fold,
            point,
            fingerprint(context, fold, _point_key(point), *part),
            folder,
            context,
            scope,
        )
        for size in sorted({point.target_size for point in points})
        for fold in range(task.n_folds(scope.shots))
        for point in points
        if point.target_size == size
    )


def chosen(task: TaskData, kind: Kind, keys: Sequence[Any]) -> Files:
    """The hyperparameters that cross-validation chose from trials of these keys."""
    folder = _folder(task, "chosen", task.name, kind)
    return Files(folder, {f"{folder}/chosen-{fingerprint(list(keys))}.parquet": task.name})


def chosen_from_trials(task: TaskData) -> Files:
    """The hyperparameters of the methods on frozen features; nothing where there are none."""
    points = [_point_key(point) for point in _frozen_points(task.config)]
    if not points:
        return Files(_folder(task, "chosen", task.name, "frozen"), {})
    return chosen(task, "frozen", [_trials_key(task), points])


def head_file(
    task: TaskData,
    point: Hyperparameters,
    seed: int,
    scope: Scope = EVERYTHING,
    kept: str = "",
    folder: str | None = None,
) -> str:
    """The head with those hyperparameters, trained on all training images, or on a part of what there is.

    ``kept``: the file of the head whose kept features it is trained on; ``folder``: that of a study.
    """
    part = [] if scope == EVERYTHING else [_stated(scope), _base(kept)]
    key = fingerprint(heads_key(task, "train"), _point_key(point), seed, *part)
    folder = _folder(task, "heads", task.name, "frozen") if folder is None else folder
    return f"{folder}/{point.method}-seed-{seed}-{key}.safetensors"


def _base(file: str) -> str:
    return file.rpartition("/")[2]


@dataclass(frozen=True)
class HeadToTrain:
    """A final head and its file; ``kept``: that of the head whose kept features it is trained on."""

    task: str
    point: Hyperparameters
    seed: int
    file: str
    scope: Scope = EVERYTHING
    kept: str = ""

    @property
    def reads_by_tap(self) -> bool:
        """Whether it reads features tap by tap."""
        return reads_by_tap(self.point.method, self.scope)


def heads(task: TaskData, points: Sequence[Hyperparameters]) -> Files:
    """The final heads of the chosen points, one per seed."""
    jobs = [
        HeadToTrain(task.name, point, seed, head_file(task, point, seed))
        for point in points
        for seed in task.config.seeds
    ]
    return Files(_folder(task, "heads", task.name, "frozen"), {job.file: job for job in jobs})


@dataclass(frozen=True)
class Finetuning:
    """One training of a backbone and its file; ``fold`` None means all training images.

    ``base``: the point of the method that it builds on, whose kept features it reads.
    """

    task: str
    point: Hyperparameters
    seed: int
    fold: int | None
    base: Hyperparameters | None
    file: str


# Settings of `finetune` that change no training: what they choose is in the point and the fold, or nowhere.
_WITHOUT_EFFECT = {"learning_rate", "steps", "folds", "seeds", "checkpoint_every", "workers_per_trial"}


def finetuning_key(task: TaskData, split: Split) -> str:
    """Changes with whatever all trainings of a backbone on a split depend on, beside point, seed, fold."""
    options, ignored = task.config.finetune, _WITHOUT_EFFECT
    if options.workers_per_trial > 1 and options.batch_norm == "batch":
        ignored = ignored - {"workers_per_trial"}  # each normalises its part of a batch by itself
    settings = options.model_dump(mode="json", exclude=ignored)
    return fingerprint(FINETUNING_VERSION, features_key(task, split), task.config.seed, settings)


def finetuning(
    task: TaskData, point: Hyperparameters, seed: int, fold: int | None, base: Hyperparameters | None
) -> Finetuning:
    """The training with that point, a row of trials for a fold or an adapted model."""
    split: Split = "train" if fold is None else task.fold_split
    # What the base keeps depends on how its heads are trained.
    keys: list[Any] = [
        finetuning_key(task, split), _point_key(point), seed,
        base and [heads_key(task, split), _point_key(base)],
    ]  # fmt: skip
    if fold is None:
        folder = _folder(task, "heads", task.name, "finetuned")
        file = f"{folder}/{point.method}-seed-{seed}-{fingerprint(keys)}.safetensors"
    else:
        folder = _folder(task, "trials", task.name, "finetuned")
        stem = f"{point.method}-rate-{point.learning_rate:g}-steps-{point.steps}-fold-{fold}"
        file = f"{folder}/{stem}-{fingerprint(keys, _folds_key(task))}.parquet"
    return Finetuning(task.name, point, seed, fold, base, file)


def finetunings(task: TaskData, first: Literal["trials", "heads"], members: Sequence[Finetuning]) -> Files:
    """Trainings that leave rows ("trials") or adapted models ("heads")."""
    return Files(_folder(task, first, task.name, "finetuned"), {member.file: member for member in members})


def checkpoints(task: TaskData) -> str:
    """The folder of the checkpoints of unfinished trainings."""
    return _folder(task, "checkpoints")


def checkpoint_file(task: TaskData, member: Finetuning) -> str:
    """The checkpoint of a training, as long as that is unfinished."""
    return f"{checkpoints(task)}/{member.file.rpartition('/')[2]}.safetensors"


def predictions(task: TaskData, kind: Kind, models: Iterable[str]) -> RowFiles:
    """What heads or adapted models, given by their files, predict for the test images."""
    key = fingerprint(PREDICTIONS_VERSION, list(models), features_key(task, "test"))
    stage = "evaluate" if kind == "frozen" else "finetune"
    folder = _folder(task, "predictions", task.name, kind)
    return _row_files(task, "test", folder, key, kind, stage)


def results(task: TaskData, kind: Kind, keys: Sequence[Any]) -> Files:
    """Result rows that follow from files of these names."""
    folder = _folder(task, "results", task.name, kind)
    return Files(folder, {f"{folder}/results-{fingerprint(list(keys))}.parquet": task.name})


def kept(task: TaskData, models: Iterable[str]) -> Files:
    """How many features of each tap the heads keep, and which."""
    folder = _folder(task, "kept", task.name, "frozen")
    return Files(folder, {f"{folder}/kept-{fingerprint(KEPT_VERSION, list(models))}.parquet": task.name})


# The products of the studies, which lie apart: they come and go without a change of the recipe.


def _study_folder(task: TaskData, kind: str, study: str) -> str:
    return f"studies/{kind}/{backbone_folder(task.config)}/{task.name}/{study}"


def _variant_key(variant: Variant) -> list[Any]:
    points = [_point_key(point) for point in variant.points]
    return [variant.name, points, _stated(variant.scope), variant.series, variant.x, variant.reference]


def study_trials(task: TaskData, study: str, variants: Sequence[Variant]) -> TrialFiles:
    """The cross-validation of the variants that leave a choice; what the sweep has done is not done again."""
    folder = _study_folder(task, "trials", study)
    members = [trial for variant in variants for trial in _variant_trials(task, folder, variant)]
    distinct = {trial.key: trial for trial in members}
    return TrialFiles(folder, _trials_key(task), tuple(distinct.values()), _trials_folder(task))


def _variant_trials(task: TaskData, folder: str, variant: Variant) -> tuple[Trial, ...]:
    return _trials(task, folder, variant.points, variant.scope) if len(variant.points) > 1 else ()


def trials_of_variant(task: TaskData, variant: Variant) -> list[str]:
    """The keys of the trials that choose for a variant; none where there is nothing to choose."""
    return [trial.key for trial in _variant_trials(task, "", variant)]


def study_chosen(task: TaskData, study: str, variants: Sequence[Variant]) -> Files:
    """The hyperparameters that cross-validation chose for every variant."""
    key = fingerprint(_trials_key(task), [_variant_key(variant) for variant in variants])
    return Files(_study_folder(task, "chosen", study), {
        f"{_study_folder(task, 'chosen', study)}/chosen-{key}.parquet": (study, task.name)
    })  # fmt: skip


def study_head(
    task: TaskData, study: str, variant: Variant, point: Hyperparameters, seed: int, kept: str = ""
) -> HeadToTrain:
    """The head of a variant and a seed."""
    file = head_file(task, point, seed, variant.scope, kept, _study_folder(task, "heads", study))
    return HeadToTrain(task.name, point, seed, file, variant.scope, kept)


def study_heads(task: TaskData, study: str, jobs: Iterable[HeadToTrain]) -> Files:
    """The heads of a study, but for those that lie elsewhere because another stage has trained them."""
    folder = _study_folder(task, "heads", study)
    return Files(folder, {job.file: job for job in jobs if job.file.startswith(f"{folder}/")})


def study_predictions(task: TaskData, study: str, jobs: Iterable[HeadToTrain], names: Any) -> RowFiles:
    """What the heads of a study predict for the test images; ``names``: of their variants."""
    heads = [_base(job.file) for job in jobs]
    key = fingerprint(PREDICTIONS_VERSION, heads, names, features_key(task, "test"))
    return _row_files(task, "test", _study_folder(task, "predictions", study), key, study, "study")


def study_results(task: TaskData, study: str, variants: Sequence[Variant], predicted: str) -> Files:
    """Result rows of a study, which follow from predictions of that key."""
    key = fingerprint(STUDY_VERSION, [_variant_key(variant) for variant in variants], predicted)
    folder = _study_folder(task, "results", study)
    return Files(folder, {f"{folder}/results-{key}.parquet": (study, task.name)})


def thumbnails(task: TaskData, predicted: str) -> Files:
    """Small images of a task; which, follows from predictions of that key."""
    folder = _folder(task, "thumbnails", task.name)
    key = fingerprint(THUMBNAILS_VERSION, task.image_identity("train"), predicted)
    return Files(folder, {f"{folder}/thumbnails-{key}.parquet": task.name})


def explanations(task: TaskData, predicted: str, count: int = 0) -> Files:
    """Explanations of so many predictions of that key; 0: only which are still right, as a run wants none."""
    folder = _folder(task, "explanations", task.name)
    key = fingerprint(EXPLANATIONS_VERSION, predicted)
    return Files(folder, {f"{folder}/of-{count}-{key}.parquet": task.name} if count else {}, [key])


def required(run: RunDirectory, name: str, stage: str) -> str:
    """The name of a file that is there; else a UserError that names the stage to run first."""
    if not run.exists(name):
        raise UserError(f"{name} is missing in {run.uri}: run the {stage} stage first")
    return name
