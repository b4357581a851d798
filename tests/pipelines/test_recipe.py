"""Recipes as files: YAML as it is meant, overrides, and files that are none."""

import subprocess
import sys
from pathlib import Path

import pytest

from h2t.errors import UserError
from pipelines.recipe import load_config

# Nine lines of which each holds the one before nine times: 9**9 values.
NESTED = b"a0: &a0 [x]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (level, level, b", ".join([b"*a%d" % (level - 1)] * 9)) for level in range(1, 10)
)


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
        (b"name: &a [*a]", "expected at most 262,144 characters"),
        (NESTED, "expected at most 262,144 characters with all aliases written out"),
        (NESTED.replace(b"[", b"{<<: [").replace(b"]", b"]}").replace(b"[x]", b"{x: 1}"), "not valid YAML"),
        (b"[" * 5000, "not valid YAML"),
        (b"seed: " + b"9" * 5000, "not valid YAML"),
        (b"seed: !!int foo", "not valid YAML"),
        (b"seed: !!bool foo", "not valid YAML"),
        (b"seed: !!python/name:os.system", "not valid YAML"),
        (b"seed: yes", 'seed: expected a valid integer, got "yes"'),
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


def test_aliases_and_merges_are_allowed(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: x\nbackbone: {name: resnet50}\ntasks:\n"
        "- {name: leaves, images: &here {format: folder, root: leaves}}\n"
        "- {name: fruits, images: {<<: *here, root: fruits}}\n- {name: again, images: *here}\n"
    )
    config = load_config(recipe)
    roots = [Path(config.task_images(task.name).root or "").name for task in config.tasks]
    assert roots == ["leaves", "fruits", "leaves"]


HEAVY = ("torch", "ray", "pandas", "scipy", "sklearn", "timm", "altair")


@pytest.mark.parametrize("wrong", ["", "grid.stesp=[1]", "images.format=foldr", "methods=[head2tow]"])
def test_reading_a_recipe_imports_nothing_slow(wrong: str) -> None:
    script = (
        "import sys\nfrom h2t.errors import UserError\nfrom pipelines.recipe import load_config\n"
        f"try: load_config('pipelines/recipes/demo.yaml', {[wrong] if wrong else []})\n"
        "except UserError as error: print(error)\n"
        f"assert not [name for name in {HEAVY} if name in sys.modules], sorted(sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert ("did you mean" in done.stdout) == bool(wrong)
