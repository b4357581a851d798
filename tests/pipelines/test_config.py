import copy
import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel, ValidationError

from h2t.errors import UserError
from h2t.methods import METHODS
from h2t.tasks import Task, find_task
from pipelines.config import Config, fingerprint
from pipelines.recipe import EXPECTED, _explain, _parts, parse_config

RECIPE = {"name": "small", "backbone": {"name": "efficientnet_lite0"}, "tasks": ["mnist"]}


def with_setting(key: str, value: object) -> dict:
    data: dict = copy.deepcopy(RECIPE)
    *parents, last = key.split(".")
    section = data
    for parent in parents:
        section = section.setdefault(parent, {})
        if isinstance(section, list):  # the tasks: one of a user's own
            section[:] = [{"name": "leaves"}]
            section = section[0]
    section[last] = value
    return data


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("grid.keep_fraction", [0.0], "keep_fraction.0: expected a number greater than 0, got 0.0"),
        ("grid.keep_fraction", [1.5], "less than or equal to 1"),
        ("cross_validation.n_folds", 1, "greater than or equal to 2, got 1"),
        ("grid.target_size", [-1], "grid.target_size.0"),
        ("grid.learning_rate", [], "grid.learning_rate"),
        ("grid.steps", ["many"], 'valid integer, got "many"'),
        ("grid.stesp", [5], "did you mean steps"),
        ("metods", ["linear"], "did you mean methods"),
        ("backbone.weigths", "auto", "did you mean weights"),
        ("methods", ["head2tow"], "did you mean head2toe"),
        ("tasks", ["mnits"], "did you mean mnist"),
        ("tasks", ["cifr100"], "tasks: unknown task 'cifr100': did you mean cifar100"),
        ("tasks", ["cifar100"], "tasks: the images of cifar100 are in no package; expected where they are"),
        ("tasks", ["mnist", "mnist"], "tasks: mnist is listed twice"),
        ("tasks", [{"name": "a/b"}], "becomes a folder"),
        ("tasks", "mnist", 'tasks: expected a list, got "mnist"'),
        ("tasks", [], "tasks: expected at least 1 value, got []"),
        ("grid", 5, "grid: expected a mapping of settings, got 5"),
        ("name", "../x", "name: the name becomes a folder"),
        ("name", "", "name: the name becomes a folder"),
        ("backbone.precision", "float8", "precision: unknown value 'float8': did you mean float32"),
        (
            "backbone.dtype",
            "float32",
            "backbone.dtype: unknown key 'dtype': did you mean backbone.precision?",
        ),
        ("head_dtype", "tf32", "head_dtype: unknown key 'head_dtype': did you mean head_precision?"),
        ("resources.batch_size", 5, "unknown key 'batch_size': did you mean resources.images_per_forward?"),
        ("resources.settings_per_trial", 5, "did you mean resources.points_per_trial?"),
        ("images", {"format": "foldr", "root": "x"}, "unknown image format 'foldr': did you mean folder"),
        (
            "tasks",
            [{"name": "x", "group": "natrual"}],
            "tasks.0.group: unknown value 'natrual': did you mean",
        ),
        ("name", "\ud800", "expected plain values in Unicode"),
        ("methods", ["head2toe_ft"], "head2toe_ft builds on head2toe, which is not listed"),
        ("images", {"format": "folder"}, "need a root"),
        ("images", {"root": "x"}, "/x') expected the format vtab1k, parquet"),
        ("images", {"format": "vtab1k", "root": "data"}, "expected archive, or their place"),
        ("on_bad_image", "ignore", "on_bad_image: unknown value 'ignore': expected one of refuse, skip"),
        ("seeds", [0, 1, 0], "seeds: expected every value once, got 0 twice"),
        ("methods", ["linear", "linear"], "methods: expected every value once, got linear twice"),
        ("grid.steps", [5, 5], "grid.steps: expected every value once, got 5 twice"),
        ("finetune.seeds", [0, 0], "finetune.seeds: expected every value once, got 0 twice"),
        (
            "grid.learning_rate",
            [float("inf")],
            "grid.learning_rate.0: expected a finite number, got Infinity",
        ),
        ("grid.coefficient", [float("nan")], "grid.coefficient.0: expected a finite number, got NaN"),
        ("resources.memory_per_trial_gb", float("inf"), "memory_per_trial_gb: expected a finite number"),
        ("seed", 10**30, "seed: expected a number less than or equal to 4294967295"),
        ("seeds", [2**70], "seeds.0: expected a number less than or equal to 4294967295"),
        (
            "grid.target_size",
            [10**23],
            "grid.target_size.0: expected a number less than or equal to 2147483647",
        ),
        ("backbone.image_size", 10**8, "backbone.image_size: expected a number less than or equal to 8192"),
        ("cross_validation", {"scheme": "archive", "n_folds": 4}, "n_folds: expected 5"),
        ("images.options", {"shuffle": {1, 2}}, "expected plain YAML values only"),
        ("backbone.max_depth", 0.0, "backbone.max_depth: expected a number greater than 0"),
        ("backbone.max_depth", 0.5, "backbone.max_depth 0.5: linear reads the embedding, where a forward"),
        ("grid.steps", "long " * 100, "…"),
    ],
)
def test_a_mistake_is_one_message_that_names_the_key(key: str, value: object, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_config(with_setting(key, value), "recipe.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_setting_is_named() -> None:
    with pytest.raises(UserError, match="backbone: required"):
        parse_config({"name": "x", "tasks": ["mnist"]}, "recipe.yaml")


def settings(section: type[BaseModel], *above: str) -> list[str]:
    """Every key of a recipe."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(".".join([*above, name]))
        for part in _parts(field.annotation):
            keys += settings(part, *above, name) if hasattr(part, "model_fields") else []
    return keys


WRONG: list[Any] = [
    None, True, -1, 0, 5.5, 2**31, 10**30, float("inf"), "", "\ud800", [], {}, [None], [True], [-1.5], [{}],
]  # fmt: skip


def test_every_kind_of_mistake_has_words_of_ours() -> None:
    problems = []
    for key, value in product(settings(Config), WRONG):
        try:
            Config.model_validate_json(json.dumps(with_setting(key, value)))
        except ValidationError as error:
            problems += error.errors()
    for problem in problems:
        explained = _explain(problem)
        assert explained.startswith(".".join(map(str, problem["loc"])))
        assert problem["msg"] not in explained or problem["type"] == "value_error"
    kinds = {problem["type"] for problem in problems}
    assert kinds == {*EXPECTED, "missing", "literal_error", "value_error"}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_needs_those_that_it_builds_on(name: str) -> None:
    assert parse_config({**RECIPE, "methods": [*METHODS]}, "recipe").methods == [*METHODS]
    for needed in filter(None, (METHODS[name].builds_on, *METHODS[name].best_of)):
        others = [other for other in METHODS if other != needed]
        with pytest.raises(UserError, match=f"builds on {needed}, which is not listed"):
            parse_config({**RECIPE, "methods": others}, "recipe")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"backbone": {"name": "resnet50", "weights": "random"}}, "finetune.* start from pretrained weights"),
        ({"finetune": {"gradient_checkpointing": True}}, "head2toe_ft.* reads features inside the parts"),
        (
            {"finetune": {"folds": 0, "steps": [5], "learning_rate": [1.0]}},
            "_plus needs cross-validation",
        ),
    ],
)
def test_settings_that_some_fine_tuned_methods_refuse(keys: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config({**RECIPE, **keys, "methods": [*METHODS]}, "recipe")
    assert parse_config({**RECIPE, **keys, "methods": ["linear", "head2toe", "scratch"]}, "recipe")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"studies": ["single-tap"]}, "single-tap reads the embedding"),
        (
            {"backbone": {"name": "resnet50", "max_depth": 0.5, "second": {"name": "vitb16"}}},
            "expected one of",
        ),
    ],
)
def test_settings_that_a_depth_refuses(keys: dict, message: str) -> None:
    deep = {**RECIPE, "methods": ["head2toe", "all_l2"], "backbone": {"name": "resnet50", "max_depth": 0.5}}
    assert parse_config(deep, "recipe").backbone.model_dump()["max_depth"] == 0.5
    with pytest.raises(UserError, match=message):
        parse_config({**deep, **keys}, "recipe")


def test_what_a_recipe_without_a_depth_says_is_what_it_said_before_there_was_one() -> None:
    assert "max_depth" not in parse_config(RECIPE, "recipe").model_dump(mode="json")["backbone"]


@dataclass
class Part:
    value: object


def test_fingerprints_change_with_every_part() -> None:
    config = parse_config(RECIPE, "recipe")
    other = parse_config(with_setting("backbone.image_size", 64), "recipe")
    assert fingerprint(config) == fingerprint(parse_config(RECIPE, "elsewhere"))
    assert fingerprint(config) != fingerprint(other)
    assert fingerprint("a", 1) != fingerprint("a", 2)
    assert fingerprint(Part(config)) != fingerprint(Part(other)) != fingerprint(Part(Part(other)))
    assert fingerprint((1, 2), np.int64(3)) == fingerprint([1, 2], 3)
    for value in ({1}, np.zeros(2), object(), Part):
        with pytest.raises(TypeError, match="expected plain values"):
            fingerprint(value)


def test_a_task_of_ones_own_needs_only_images() -> None:
    own = {"name": "leaves", "n_classes": 3, "group": "natural", "images": {"format": "folder", "root": "x"}}
    config = parse_config({**RECIPE, "tasks": [own]}, "recipe")
    assert (config.task("leaves").n_classes, config.task("leaves").group) == (3, "natural")
    assert config.task_images("leaves").root == str(Path("x").absolute())


@pytest.mark.parametrize("name", ["flowers", "pets", "cifar", "textures", "dtd", "dSpr-Loc"])
def test_a_task_of_ones_own_may_have_the_name_of_a_known_one(name: str) -> None:
    own = {"name": name, "group": "other", "images": {"format": "folder", "root": "x"}}
    config = parse_config({**RECIPE, "tasks": [own]}, "recipe")
    assert config.task(name) == Task(name, name, "other", 0, n_train=0)
    del own["group"]
    known = parse_config({**RECIPE, "tasks": [own]}, "recipe").tasks[0].name
    assert known == find_task(name).name


def test_paths_are_absolute_wherever_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {
        **RECIPE,
        "backbone": {"name": "resnet50", "weights": "mine.pth"},
        "images": {"format": "folder", "root": "../all"},
        "tasks": [{"name": "leaves", "images": {"format": "folder", "root": "leaves"}}],
        "cross_validation": {"images": {"format": "folder", "root": "~/folds"}},
    }
    config = parse_config(settings, "recipe")
    assert config.backbone.weights == str(tmp_path / "mine.pth")
    assert config.images.root == str(tmp_path / "../all")
    assert config.task_images("leaves").root == str(tmp_path / "leaves")
    assert config.cross_validation.images is not None
    assert config.cross_validation.images.root == str(Path.home() / "folds")
    remote = parse_config({**settings, "images": {"format": "folder", "root": "s3://all/of"}}, "recipe")
    assert remote.images.root == "s3://all/of"
    assert parse_config(RECIPE | {"backbone": {"name": "resnet50"}}, "recipe").backbone.weights == "auto"
