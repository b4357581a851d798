"""Reads a recipe: a YAML file and overrides, to a validated configuration or a message of what is wrong."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from h2t.errors import UserError, unknown
from pipelines.config import Config


class _Loader(yaml.SafeLoader):
    """YAML as recipes mean it: ``1e-5`` is a number, a date is text, and no key stands twice."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"'{key.value}' is given twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe and apply ``key.subkey=value`` overrides.

    Raises UserError, one line per mistake, naming the key, what was expected and the nearest name.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no recipe at '{path}'; expected a YAML file")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the recipe '{path}': {error}") from None
    data = _parse(text, str(path))
    if not isinstance(data, dict):
        found = "nothing" if data is None else type(data).__name__
        raise UserError(f"{path}: expected a mapping of settings, got {found}")
    for override in overrides:
        _override(data, override)
    return parse_config(data, str(path))


def parse_config(data: dict[str, Any], origin: str) -> Config:
    """Validate plain settings; ``origin`` names them in errors."""
    try:
        text = json.dumps(data)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{origin}: expected plain YAML values only: {error}") from None
    try:
        return Config.model_validate_json(text)
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        raise UserError(f"{origin}: " + "; ".join(dict.fromkeys(lines))) from None


def _parse(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except Exception as error:  # what its constructors raise on odd values is of many kinds
        raise UserError(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from None


def _override(data: dict[str, Any], override: str) -> None:
    key, sign, value = override.partition("=")
    if not sign or not all(key.split(".")):
        raise UserError(f"--set expects key=value, got '{override}'")
    *parents, last = key.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise UserError(f"--set {override}: '{parent}' is not a section")
    data[last] = _parse(value, f"--set {override}")


# What the validation says in the words of JSON, in those of a recipe.
WORDING = {
    "Input should be greater": "expected a number greater",
    "Input should be less": "expected a number less",
    "Input should be a valid array": "expected a list",
    "Input should be an object": "expected a mapping of settings",
    "Input should be": "expected",
}


def _explain(problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        return f"{key}: {unknown('key', location[-1], _fields(location[:-1]))}"
    if problem["type"] == "missing":
        return f"{key}: required, but not given"
    if problem["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
        return f"{key}: {unknown('value', problem['input'], choices)}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    if problem["type"] == "too_short":
        message = f"expected at least {problem['ctx']['min_length']} value"
    for theirs, ours in WORDING.items():
        message = message.replace(theirs, ours)
    got = json.dumps(problem["input"])
    return f"{key}: {message}, got {got if len(got) <= 80 else got[:80] + '…'}"


def _fields(location: list[str]) -> list[str]:
    """Names of the settings in a section of the configuration."""
    model: type[BaseModel] = Config
    for part in location:
        if part in model.model_fields:
            model = next(_models(model.model_fields[part].annotation), model)
    return list(model.model_fields)


def _models(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)
