from pathlib import Path

import pytest

from h2t.config import fingerprint, load_config, parse_config
from h2t.errors import UserError

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
        ("grid.keep_fraction", [0.0], "grid.keep_fraction.0: input should be greater than 0, got 0.0"),
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
        ("tasks", ["mnist", "mnist"], "listed twice"),
        ("tasks", [{"name": "a/b"}], "becomes a folder"),
        ("backbone.dtype", "float8", "'float32' or 'bfloat16'"),
        ("images", {"format": "folder"}, "need a root"),
        ("on_bad_image", "ignore", "'refuse' or 'skip'"),
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


def test_exponents_without_a_point_are_numbers_and_overrides_apply(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: x\nbackbone: {name: resnet50}\ntasks: [mnist]\ngrid: {coefficient: [1e-5, 1E3, 2]}\n"
    )
    config = load_config(recipe, ["grid.steps=[7]", "backbone.image_size=64"])
    assert config.grid.coefficient == [1e-5, 1e3, 2.0]
    assert config.grid.steps == [7]
    assert config.backbone.image_size == 64


@pytest.mark.parametrize(
    ("override", "message"),
    [("steps", "key=value"), ("name.x=1", "not a section"), ("grid.steps=[1", "not valid YAML")],
)
def test_bad_overrides(tmp_path: Path, override: str, message: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: x\nbackbone: {name: resnet50}\ntasks: [mnist]\n")
    with pytest.raises(UserError, match=message):
        load_config(recipe, [override])


@pytest.mark.parametrize(("text", "message"), [("a: [", "not valid YAML"), ("- 1", "expected a mapping")])
def test_files_that_are_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(recipe)
    with pytest.raises(UserError, match="no recipe at"):
        load_config(tmp_path / "none.yaml")


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


def test_the_shipped_recipes_are_valid() -> None:
    recipes = sorted((Path(__file__).parents[2] / "pipelines" / "recipes").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        assert load_config(recipe).tasks
