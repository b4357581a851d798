"""The validated configuration of a run, and fingerprints of its parts."""

import hashlib
import json
import re
from collections import Counter
from dataclasses import asdict, fields, is_dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from h2t.backbones.aggregation import Aggregation, ClassToken, Pooling, Tokens
from h2t.errors import UserError
from h2t.heads.spec import Precision
from h2t.hyperparameters import Hyperparameters
from h2t.images.formats import check_format, find_format
from h2t.methods import METHODS, check_depth, find_method, search_space
from h2t.precision import StoredPrecision
from h2t.tasks import DEMO, Group, Task, demo_task, find_task
from pipelines.studies import checked_name, find_study

if TYPE_CHECKING:
    from h2t.finetuning import FinetuneOptions

Store = Literal["features", "gram"]
"""What is kept of training images: features, or the products of those of all pairs, tap by tap."""

Fraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]  # what Parquet and every library here take
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]

Value = TypeVar("Value")


def _distinct(values: list[Value]) -> list[Value]:
    """A repeated seed would count as one more seed, a repeated value of a grid would be computed twice."""
    repeated = [value for value, count in Counter(values).items() if count > 1]
    if repeated:
        raise ValueError(f"expected every value once, got {repeated[0]} twice")
    return values


Values = Annotated[list[Value], Field(min_length=1), AfterValidator(_distinct)]


LONGEST_NAME = 100  # of what file systems take, 255 bytes, names of files need some for keys


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ValueError(f"the name becomes a folder: letters, digits, '_', '-' and '.' only, got '{name}'")
    if len(name) > LONGEST_NAME:
        raise ValueError(
            f"the name becomes a folder: expected at most {LONGEST_NAME} characters, got {len(name)}"
        )
    return name


def _absolute(path: str) -> str:
    """Relative to the working directory, since workers have others."""
    return path if "://" in path else str(Path(path).expanduser().absolute())


FolderName = Annotated[str, AfterValidator(_folder_name)]
StudyName = Annotated[str, AfterValidator(checked_name)]
MethodName = Annotated[str, AfterValidator(lambda name: find_method(name).name)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _weights(weights: str) -> str:
    return weights if weights in ("auto", "random") else _absolute(weights)


class SecondBackbone(_Section):
    """A second network, whose embedding stands beside the taps of the first."""

    name: str
    weights: Annotated[str, AfterValidator(_weights)] = "auto"
    sha256: str | None = None


class BackboneConfig(_Section):
    """Which frozen network is read, where its weights come from, and how images reach it.

    ``max_depth``: the share of the multiply-adds of a forward pass after which nothing is read any more, so
    that neither training nor an adapter needs more of it; null is all.

    Paths, here and elsewhere in a recipe, are relative to the working directory.
    """

    name: str
    weights: Annotated[str, AfterValidator(_weights)] = "auto"
    sha256: str | None = None
    image_size: Annotated[int, Field(ge=1, le=8192)] | None = None
    taps: str = "auto"
    cls_token: ClassToken = "normal"
    tokens: Tokens = "sequence"
    pooling: Pooling = "average"
    resize: Literal["bilinear", "bicubic"] = "bilinear"
    normalization: Literal["backbone", "minus_one_to_one", "imagenet"] = "backbone"
    second: SecondBackbone | None = None
    precision: Precision = "float32"
    max_depth: Fraction | None = None

    @property
    def aggregation(self) -> Aggregation:
        """How activations become features."""
        return Aggregation(self.cls_token, self.tokens, self.pooling)

    @model_serializer(mode="wrap")
    def _later_settings_where_set(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without settings that came later and are at their defaults: keys of earlier runs stay theirs."""
        later = [("tokens", "sequence"), ("pooling", "average"), ("max_depth", None)]
        return {name: value for name, value in dump(self).items() if (name, value) not in later}


class ImagesConfig(_Section):
    """Where the images of the tasks come from; ``flips``: mirror images are training images too."""

    format: str = "bundled"
    root: Annotated[str, AfterValidator(_absolute)] | None = None
    options: dict[str, Any] = {}
    flips: bool = False

    @model_serializer(mode="wrap")
    def _later_settings_where_set(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if (name, value) != ("flips", False)}

    @model_validator(mode="after")
    def _a_known_format_and_its_root(self) -> "ImagesConfig":
        check_format(self.format, self.root)
        return self


class FeaturesConfig(_Section):
    """How the features are stored: float16 takes half the bytes, on the disk and in memory.

    ``store: gram`` keeps none of them, but the products of all pairs of training images, tap by tap.
    """

    precision: StoredPrecision = "float32"
    store: Store = "features"

    @model_validator(mode="before")
    @classmethod
    def _in_a_word(cls, given: Any) -> Any:
        return {"store": given} if given in get_args(Store) else given

    @model_validator(mode="after")
    def _a_precision_of_what_is_stored(self) -> "FeaturesConfig":
        if self.store == "gram" and self.precision != "float32":
            raise ValueError(f"precision: nothing is stored in {self.precision} with store: gram")
        return self


class TaskConfig(_Section):
    """A task: a known one, or a user's own, which has images of its own and an unknown name or a group."""

    # Before the name, which means something else with them.
    group: Group | None = None
    images: ImagesConfig | None = None
    name: str
    title: str | None = None
    n_classes: Annotated[int, Field(ge=2)] | None = None

    @field_validator("name")
    @classmethod
    def _known_or_usable_in_a_path(cls, name: str, info: ValidationInfo) -> str:
        own = info.data.get("group") and info.data.get("images")
        return find_task(name).name if _known(name) and not own else _folder_name(name)

    @property
    def own(self) -> bool:
        """Whether it is a user's, whatever its name."""
        return self.images is not None and (self.group is not None or not _known(self.name))


class Grid(_Section):
    """The values the cross-validation tries (Appendix A).

    ``layergroup_coefficient`` has 1 beside Head2Toe's: the official code forgets the factor of that penalty.

    The appendix lists ``keep_fraction`` up to 0.1; four rows of its Table 2 have 0.2, as the official command
    line does.
    """

    target_size: Values[Count] = [512, 8192, 24576]
    learning_rate: Values[Positive] = [0.1, 0.01]
    steps: Values[Count] = [500, 5000]
    coefficient: Values[Positive] = [0.001, 0.0001, 0.00001]
    head2toe_coefficient: Values[Positive] = [0.001, 0.00001]
    layergroup_coefficient: Values[Positive] = [1.0, 0.001, 0.00001]
    keep_fraction: Values[Fraction] = [
        0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2,
    ]  # fmt: skip


class CrossValidation(_Section):
    """How images are cut into folds, and which: the training images, or ``images`` where given.

    ``blocks`` is the paper's scheme: the first 1000 images of the original training set, in order, which are
    not quite the 1000 that the final heads are trained on. ``archive`` is what VTAB's 800 + 200 images allow.
    ``shuffled`` mixes the training images by the run's seed first.
    """

    n_folds: Annotated[int, Field(ge=2)] = 5
    scheme: Literal["blocks", "archive", "shuffled"] = "blocks"
    images: ImagesConfig | None = None

    @model_validator(mode="after")
    def _folds_of_the_archive(self) -> "CrossValidation":
        if self.scheme == "archive" and self.n_folds != 5:
            raise ValueError(f"n_folds: expected 5, which the scheme 'archive' has, got {self.n_folds}")
        return self


class Resources(_Section):
    """How the work is cut and what each piece may use; null means derived from the cluster.

    ``compile`` hands the backbone with its taps to ``torch.compile``, which takes each actor a minute.
    """

    actors: Count | None = None
    gpus_per_actor: Annotated[float, Field(ge=0)] | None = None
    cpus_per_actor: Count = 1
    gpus_per_trial: Annotated[float, Field(ge=0)] | None = None
    cpus_per_trial: Count = 1
    concurrent_trials: Count | None = None
    points_per_trial: Count | None = None
    memory_per_trial_gb: Positive = 8.0
    shard_size: Count = 250
    images_per_forward: Count = 50
    compile: bool = False
    feature_compression: Literal["none", "zstd"] = "none"
    max_failures: Annotated[int, Field(ge=0)] = 2
    no_progress_timeout_s: Annotated[float, Field(ge=10)] = 1800.0


class FinetuneConfig(_Section):
    """How the methods that train the backbone do it; ``h2t.finetuning`` says where the defaults come from.

    ``batch_norm`` "frozen" normalises by the pretrained statistics in training too. ``folds`` of the
    cross-validation are used (null: all; 0: none, for a single rate and number of steps). ``seeds``: null
    is the recipe's.
    """

    learning_rate: Values[Positive] = [0.1, 0.01]
    steps: Values[Count] = [500, 5000]
    batch_size: Count = 128
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    batch_norm: Literal["batch", "frozen"] = "batch"
    precision: Precision = "float32"
    gradient_accumulation: Count = 1
    gradient_checkpointing: bool = False
    checkpoint_every: Count = 250
    workers_per_trial: Count = 1
    folds: Annotated[int, Field(ge=0)] | None = None
    seeds: Values[Seed] | None = None

    @model_validator(mode="after")
    def _something_chooses(self) -> "FinetuneConfig":
        if self.folds == 0 and len(self.learning_rate) * len(self.steps) > 1:
            raise ValueError("folds: 0 leaves nothing to choose by; give one learning_rate and one steps")
        return self

    def options(self) -> "FinetuneOptions":
        """What one training needs to know."""
        from h2t.finetuning import FinetuneOptions  # imports torch, which reading a recipe does not need

        return FinetuneOptions(**self.model_dump(include={field.name for field in fields(FinetuneOptions)}))


class Config(_Section):
    """Everything that determines a run's results, and how its work is spread.

    ``deterministic``: "machine" repeats results to the last bit on processors of one kind with one thread per
    trial; "strict" also on other kinds that have AVX2, and with more threads, at the price of using no wider
    instructions. ``control``: the network of the study of that name.
    """

    name: FolderName
    backbone: BackboneConfig
    tasks: Annotated[list[TaskConfig], Field(min_length=1)]
    images: ImagesConfig = ImagesConfig()
    features: FeaturesConfig = FeaturesConfig()
    methods: Values[MethodName] = ["linear", "all_l2", "all_l1", "all_l21", "head2toe"]
    grid: Grid = Grid()
    cross_validation: CrossValidation = CrossValidation()
    finetune: FinetuneConfig = FinetuneConfig()
    seed: Seed = 0
    seeds: Values[Seed] = [0, 1, 2]
    studies: Annotated[list[StudyName], AfterValidator(_distinct)] = []
    control: SecondBackbone | None = None
    batch_size: Count = 128
    head_precision: Precision = "float32"
    deterministic: Literal["machine", "strict"] = "machine"
    on_bad_image: Literal["refuse", "skip"] = "refuse"
    resources: Resources = Resources()

    @field_validator("tasks", mode="before")
    @classmethod
    def _names_are_tasks(cls, tasks: Any) -> Any:
        if not isinstance(tasks, list):
            return tasks
        return [{"name": task} if isinstance(task, str) else task for task in tasks]

    @model_validator(mode="after")
    def _methods_have_what_they_need(self) -> "Config":
        methods = [METHODS[name] for name in self.methods]
        finetuned = [method for method in methods if method.trains_backbone]
        pretrained = [method.name for method in finetuned if method.pretrained]
        if pretrained and self.backbone.weights == "random":
            raise ValueError(
                f"methods: {', '.join(pretrained)} start from pretrained weights; expected auto or a file as "
                "backbone.weights, got 'random'"
            )
        for method in methods:
            missing = [
                name for name in (method.builds_on, *method.best_of) if name not in [None, *self.methods]
            ]
            if missing:
                raise ValueError(
                    f"methods: {method.name} builds on {missing[0]}, which is not listed; add it"
                )
            if self.finetune.folds == 0 and any(METHODS[name].trains_backbone for name in method.best_of):
                raise ValueError(f"methods: {method.name} needs cross-validation, but finetune.folds is 0")
        if finetuned and self.backbone.second:
            raise ValueError(
                f"backbone.second: {finetuned[0].name} trains the backbone; expected methods on frozen ones"
            )
        self._check_store()
        try:
            check_depth(self.backbone.max_depth, self.methods)
        except UserError as error:
            raise ValueError(f"backbone.{error}") from None
        if self.backbone.max_depth and self.backbone.second:
            raise ValueError(
                "backbone.max_depth: a second network runs after the first; expected one of both"
            )
        if self.backbone.max_depth and "single-tap" in self.studies:
            raise ValueError(
                "studies: single-tap reads the embedding; expected no backbone.max_depth with it"
            )
        inside = [method.name for method in finetuned if method.features == "kept"]
        if inside and self.finetune.gradient_checkpointing:
            raise ValueError(
                f"finetune.gradient_checkpointing: {', '.join(inside)} reads features inside the parts of "
                "the network that would be computed twice; use finetune.gradient_accumulation instead"
            )
        if not set(self.finetune.seeds or self.seeds) <= set(self.seeds):
            raise ValueError(
                f"finetune.seeds: expected some of seeds {self.seeds}, got {self.finetune.seeds}"
            )
        if (self.finetune.folds or 0) > self.cross_validation.n_folds:
            raise ValueError(
                f"finetune.folds: expected at most cross_validation.n_folds "
                f"({self.cross_validation.n_folds}), got {self.finetune.folds}"
            )
        for name in self.studies:
            missing = [method for method in find_study(name).needs if method not in self.methods]
            if missing:
                raise ValueError(f"studies: {name} builds on {missing[0]}; expected it among methods")
            if name == "control" and self.control is None:
                raise ValueError("studies: control needs a second network; expected control: {name: …}")
        return self

    def _check_store(self) -> None:
        """Raise ValueError for what needs features where none are stored."""
        if self.features.store == "features":
            return
        needing = [
            name
            for name in self.methods
            if (not METHODS[name].trains_backbone and name != "tap_kernels") or METHODS[name].builds_on
        ]
        if needing or self.studies:
            what = f"methods: {needing[0]}" if needing else f"studies: {self.studies[0]}"
            raise ValueError(
                f"{what} needs features, of which store: gram keeps none; expected tap_kernels, methods that "
                "train the backbone, or features: {store: features}"
            )

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        counts = Counter(task.name for task in self.tasks)
        repeated = sorted(name for name, count in counts.items() if count > 1)
        if repeated:
            raise ValueError(f"tasks: {', '.join(repeated)} is listed twice")
        for task in self.tasks:
            try:
                self.task(task.name)
            except UserError as error:
                raise ValueError(f"tasks: {error}") from None
        folds = self.cross_validation
        formats = {(task.images or self.images).format for task in self.tasks}
        if folds.scheme == "blocks" and not folds.images and "vtab1k" in formats:
            raise ValueError(
                "cross_validation.scheme: 'blocks' cuts the first 1000 images of an original training set, "
                "which an archive does not hold; expected archive, or their place as cross_validation.images"
            )
        return self

    def task(self, name: str) -> Task:
        """The task of that name: a known one with the recipe's own settings on top.

        Raises UserError for a name that is neither known nor given its own images.
        """
        config = self.task_settings(name)
        if config.own:
            known = Task(name, name, "other", 0, n_train=0)
        else:
            known = find_task(name)
            if find_format(self.task_images(name).format).packaged:
                if name not in [task.name for task in DEMO]:
                    raise UserError(
                        f"the images of {name} are in no package; expected where they are, such as "
                        "images: {format: vtab1k, root: data/vtab-1k}"
                    )
                known = demo_task(name)
        return replace(
            known,
            title=config.title or known.title,
            group=config.group or known.group,
            n_classes=config.n_classes or known.n_classes,
        )

    def task_settings(self, name: str) -> TaskConfig:
        """What the recipe says of a task."""
        return next(task for task in self.tasks if task.name == name)

    def task_images(self, name: str) -> ImagesConfig:
        """Where the images of a task come from: its own setting, or the recipe's."""
        return self.task_settings(name).images or self.images

    def search_space(self, method: str) -> list[Hyperparameters]:
        """The points of the search space of one method on frozen features.

        Where none are stored, nothing is reweighted by feature.
        """
        points = search_space(method, self.grid)
        if self.features.store == "features":
            return points
        return [point for point in points if point.coefficient == 0]


def _known(name: str) -> bool:
    try:
        find_task(name)
    except UserError:
        return False
    return True


def fingerprint(*parts: Any) -> str:
    """Twelve hexadecimal digits that change with any of the parts.

    Parts are JSON values, numbers of NumPy, dataclasses and sections of a configuration; else a TypeError.
    """
    text = json.dumps(parts, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Integral):  # NumPy's
        return int(value)
    raise TypeError(f"expected plain values, dataclasses or configurations, got {type(value).__name__}")
