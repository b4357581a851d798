import pytest

from h2t.errors import UserError
from pipelines.config import fingerprint
from pipelines.recipe import parse_config

RECIPE = {"name": "small", "backbone": {"name": "efficientnet_lite0"}, "tasks": ["mnist"]}


def with_setting(key: str, value: object) -> dict:
    data: dict = {**RECIPE, "backbone": dict(RECIPE["backbone"])}
    *parents, last = key.split(".")
    section = data
    for parent in parents:
        section = section.setdefault(parent, {})
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
        ("backbone.dtype", "float8", "backbone.dtype: unknown value 'float8': did you mean float32"),
        (
            "images",
            {"format": "foldr", "root": "x"},
            "images.format: unknown value 'foldr': did you mean folder",
        ),
        ("images", {"format": "folder"}, "need a root"),
        ("images", {"root": "x"}, "images: with a root ('x') expected the format vtab1k"),
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


def test_fingerprints_change_with_every_part() -> None:
    config = parse_config(RECIPE, "recipe")
    other = parse_config(with_setting("backbone.image_size", 64), "recipe")
    assert fingerprint(config) == fingerprint(parse_config(RECIPE, "elsewhere"))
    assert fingerprint(config) != fingerprint(other)
    assert fingerprint("a", 1) != fingerprint("a", 2)


def test_a_task_of_ones_own_needs_only_images() -> None:
    own = {"name": "leaves", "n_classes": 3, "group": "natural", "images": {"format": "folder", "root": "x"}}
    config = parse_config({**RECIPE, "tasks": [own]}, "recipe")
    assert (config.task("leaves").n_classes, config.task("leaves").group) == (3, "natural")
    assert config.task_images("leaves").root == "x"
