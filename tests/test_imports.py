"""The one way for imports: pipelines -> h2t, and h2t without Ray."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]


def imported(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


def test_h2t_imports_neither_ray_nor_the_pipelines() -> None:
    files = sorted((ROOT / "h2t").rglob("*.py"))
    assert len(files) > 10
    guilty = [str(path) for path in files if imported(path) & {"ray", "pipelines", "tests"}]
    assert guilty == []


def test_no_code_writes_or_reads_objects_that_run_code() -> None:
    files = [*(ROOT / "h2t").rglob("*.py"), *(ROOT / "pipelines").rglob("*.py")]
    guilty = [str(path) for path in files if imported(path) & {"pickle", "cloudpickle", "joblib", "dill"}]
    assert guilty == []
