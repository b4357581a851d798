"""Heads and models of a run, read with an error that names a file which is not as it was written."""

from typing import Any

from safetensors import SafetensorError

from h2t.adapter import load_head
from h2t.errors import UserError
from h2t.finetuning import TrainableModel, load_model
from h2t.head2toe import Head
from pipelines.run_directory import RunDirectory, damaged


def read_head(run: RunDirectory, name: str) -> tuple[Head, dict[str, str]]:
    """A head and its provenance."""
    data = run.read(name)
    try:
        return load_head(data)
    except UserError as error:
        raise damaged(name, error) from None


def read_model(run: RunDirectory, name: str, *arguments: Any) -> tuple[TrainableModel, dict[str, Any]]:
    """A fine-tuned model and its content; ``arguments``: what ``load_model`` takes beside the file."""
    data = run.read(name)
    try:
        return load_model(data, *arguments)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise damaged(name, error) from None
