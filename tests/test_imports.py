"""The one way for imports (stages -> the rest of pipelines -> h2t), and that packages are declared."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
STAGES = {f"pipelines.{stage}" for stage in ("extract", "sweep", "evaluate", "finetune")}


def imported(path: Path) -> set[str]:
    """Names of what a file imports, and of the packages these are in."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: expected absolute imports"
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names | {name.split(".")[0] for name in names}


IMPORTS = {
    str(path.relative_to(ROOT)): imported(path)
    for package in ("h2t", "pipelines")
    for path in sorted((ROOT / package).rglob("*.py"))
}


def importing(folder: str, forbidden: set[str]) -> set[str]:
    """The files of a folder that import one of the modules."""
    files = [file for file in IMPORTS if file.startswith(folder)]
    assert len(files) > 3
    return {file for file in files if IMPORTS[file] & forbidden}


def test_h2t_imports_neither_ray_nor_the_pipelines() -> None:
    assert importing("h2t/", {"ray", "pipelines", "tests"}) == set()


def test_only_the_runner_imports_stages() -> None:
    assert importing("pipelines/", STAGES) <= {"pipelines/run.py", "pipelines/cli.py"}


def test_the_report_imports_neither_ray_nor_a_stage() -> None:
    """Not even by way of others."""
    modules = [file[:-3].replace("/", ".") for file in IMPORTS if file.startswith("pipelines/report/")]
    script = (
        f"import importlib, sys; [importlib.import_module(name) for name in {modules}]; print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {"ray", *STAGES} & set(done.stdout.split()) == set()


def test_no_code_writes_or_reads_objects_that_run_code() -> None:
    assert importing("", {"pickle", "cloudpickle", "joblib", "dill"}) == set()


def test_what_is_imported_is_declared() -> None:
    def normal(requirement: str) -> str:
        return re.sub(r"[-_.]+", "-", re.split(r"[][<>=;~ ]", requirement)[0]).lower()

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = {*map(normal, [*project["dependencies"], *extras["demo"], *extras["tfds"]])}
    distributions = packages_distributions()
    names = {name.split(".")[0] for imports in IMPORTS.values() for name in imports}
    names -= {*sys.stdlib_module_names, "h2t", "pipelines"}
    assert "numpy" in names
    assert [name for name in sorted(names) if declared.isdisjoint(map(normal, distributions[name]))] == []
