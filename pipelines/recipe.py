"""Reads a recipe: a YAML file and overrides, to a validated configuration or a message of what is wrong."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from h2t.errors import UserError, unknown
from pipelines.config import Config

LARGEST = 2**18
"""Characters of a recipe with its aliases written out: a few lines of aliases can stand for gigabytes."""


class _Constructor(SafeConstructor):
    """YAML 1.2, where a date is text as it is in JSON."""

    def construct_document(self, node: Node) -> Any:
        if _size(node, {}) > LARGEST:
            raise MarkedYAMLError(
                problem=f"expected at most {LARGEST:,} characters with all aliases written out, got more"
            )
        return super().construct_document(node)

    def check_mapping_key(self, node: Node, key_node: Node, mapping: Any, key: Any, value: Any) -> bool:
        if key in mapping:
            raise MarkedYAMLError(problem=f"'{key}' is given twice", problem_mark=key_node.start_mark)
        return True


_Constructor.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_scalar)


def _size(node: Node, known: dict[int, float]) -> float:
    """Characters of a node with its aliases written out: infinitely many for one that holds itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        parts = node.value  # text, nodes, or pairs of nodes
        if isinstance(node, MappingNode):
            parts = [part for pair in parts for part in pair]
        nested = isinstance(node, MappingNode | SequenceNode)
        known[id(node)] = 1 + (sum(_size(part, known) for part in parts) if nested else len(parts))
    return known[id(node)]


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
        got = "nothing" if data is None else type(data).__name__
        raise UserError(f"{path}: expected a mapping of settings, got {got}")
    for override in overrides:
        apply_override(data, override)
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
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    try:
        return yaml.load(text)
    except Exception as error:  # what its constructors raise on odd values is of many kinds
        raise UserError(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from None


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set ``key.subkey=value`` in plain settings. Raises UserError for text of another form."""
    key, sign, value = override.partition("=")
    if not sign or not all(key.split(".")):
        raise UserError(f"--set expects key=value, got '{override}'")
    *parents, last = key.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise UserError(f"--set {override}: '{parent}' is not a section")
    data[last] = _parse(value, f"--set {override}")


# What is expected, by the type of pydantic's error; values in braces are of its context.
EXPECTED = {
    "model_type": "a mapping of settings",
    "dict_type": "a mapping of settings",
    "list_type": "a list",
    "string_type": "text",
    "bool_type": "true or false",
    "int_type": "a valid integer",
    "float_type": "a valid number",
    "finite_number": "a finite number",
    "greater_than": "a number greater than {gt:.12g}",
    "greater_than_equal": "a number greater than or equal to {ge:.12g}",
    "less_than": "a number less than {lt:.12g}",
    "less_than_equal": "a number less than or equal to {le:.12g}",
    "too_short": "at least {min_length} value",
    "json_invalid": "plain values in Unicode, not too deeply nested",
}

RENAMED = {
    "head_dtype": "head_precision",
    "backbone.dtype": "backbone.precision",
    "resources.batch_size": "resources.images_per_forward",
    "resources.settings_per_trial": "resources.points_per_trial",
}


def _explain(problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    key, kind, value = ".".join(location), problem["type"], problem["input"]
    if key in RENAMED and kind == "extra_forbidden":
        return f"{key}: unknown key '{location[-1]}': did you mean {RENAMED[key]}? It has that name now"
    if kind == "extra_forbidden":
        return f"{key}: {unknown('key', location[-1], _section(location[:-1]).model_fields)}"
    if kind == "missing":
        return f"{key}: required, but not given"
    if kind == "literal_error":
        field = _section(location[:-1]).model_fields[location[-1]]
        choices = [part for part in _parts(field.annotation) if isinstance(part, str)]
        return f"{key}: {unknown('value', value, choices)}"
    if kind == "value_error":
        message = str(problem["ctx"]["error"])
    else:
        got = json.dumps(value)
        got = got if len(got) <= 80 else got[:80] + "…"
        message = f"expected {EXPECTED[kind].format(**problem.get('ctx', {}))}, got {got}"
        if kind == "string_type" and isinstance(value, int | float):
            message += f"; write it in quotes, as '{got}'"
    return f"{key}: {message}" if key else message


def _section(location: list[str]) -> type[BaseModel]:
    """The section of the configuration at a location."""
    section: type[BaseModel] = Config
    for part in location:
        if part in section.model_fields:  # else the index of a list
            models = (t for t in _parts(section.model_fields[part].annotation) if hasattr(t, "model_fields"))
            section = next(models, section)
    return section


def _parts(annotation: Any) -> Iterator[Any]:
    """A type and the types and values that it is made of."""
    yield annotation
    for argument in get_args(annotation):
        yield from _parts(argument)
