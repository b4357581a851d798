"""What `import h2t` offers, each in a process of its own: the tests' process has imported everything."""

import subprocess
import sys

import pytest

import h2t


def run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_neither_torch_nor_ray() -> None:
    modules = run("import h2t, sys; dir(h2t); print(*sys.modules)").split()
    assert "h2t" in modules
    assert {"numpy", "timm", "torch", "ray"}.isdisjoint(modules)


@pytest.mark.parametrize("name", h2t.__all__)
def test_public_names_are_listed_and_imported_when_asked_for(name: str) -> None:
    assert run(f"import h2t; assert '{name}' in dir(h2t); print(h2t.{name}.__name__)").strip() == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'h2t' has no attribute 'Head3Toe'"):
        h2t.Head3Toe  # noqa: B018
