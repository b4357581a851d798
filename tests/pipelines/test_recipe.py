"""Recipes as files: YAML as it is meant, overrides, and files that are none."""

from pathlib import Path

import pytest

from h2t.errors import UserError
from pipelines.recipe import load_config


def test_exponents_without_a_point_are_numbers_and_overrides_apply(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: x\nbackbone: {name: resnet50}\ntasks: [mnist]\ngrid: {coefficient: [1e-5, 1E3, 2]}\n"
    )
    config = load_config(recipe, ["grid.steps=[7]", "backbone.image_size=64", "name=2026-01-31"])
    assert config.name == "2026-01-31"
    assert config.grid.coefficient == [1e-5, 1e3, 2.0]
    assert config.grid.steps == [7]
    assert config.backbone.image_size == 64


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "key=value"),
        ("grid..steps=[1]", "key=value"),
        ("name.x=1", "not a section"),
        ("grid.steps=[1", "not valid YAML"),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, message: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: x\nbackbone: {name: resnet50}\ntasks: [mnist]\n")
    with pytest.raises(UserError, match=message):
        load_config(recipe, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a: [", "not valid YAML"),
        (b"- 1", "expected a mapping of settings, got list"),
        (b"", "expected a mapping of settings, got nothing"),
        (b"\xff\xfe\xfa", "cannot read the recipe"),
        (b"grid: {steps: [1]}\ngrid: {steps: [2]}", "'grid' is given twice"),
        (b"grid: {steps: [1], steps: [2]}", "'steps' is given twice"),
        (b"name: &a [*a]", "Circular reference"),
        (b"[" * 5000, "not valid YAML"),
        (b"seed: " + b"9" * 5000, "not valid YAML"),
        (b"seed: !!int foo", "not valid YAML"),
        (b"seed: !!bool foo", "not valid YAML"),
        (b"seed: !!timestamp foo", "not valid YAML"),
        (b"seed: 2026-99-99", 'seed: expected a valid integer, got "2026-99-99"'),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: bytes, message: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(text)
    with pytest.raises(UserError, match=message):
        load_config(recipe)
    with pytest.raises(UserError, match="no recipe at"):
        load_config(tmp_path / "none.yaml")


def test_the_shipped_recipes_are_valid() -> None:
    recipes = sorted((Path(__file__).parents[2] / "pipelines" / "recipes").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        assert load_config(recipe).tasks
