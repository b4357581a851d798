"""Numbered pieces of work as trials of Ray Tune: side by side on reused actors, retried if a worker dies."""

import tempfile
from collections.abc import Callable
from typing import Any

from ray import tune

from h2t.errors import UserError


def run_trials(
    piece: Callable[[int, dict[str, Any]], None],
    shared: dict[str, Any],
    n_pieces: int,
    *,
    resources: dict[str, float],
    at_once: int | None,
    max_failures: int,
    on_done: Callable[[int], None],
) -> None:
    """Call ``piece(number, shared)`` in a trial for every number below ``n_pieces``; it writes its own files.

    ``shared`` is stored once and read by all trials; ``at_once`` bounds the trials side by side (None: by
    ``resources`` alone). Raises UserError for a user's mistake in a piece, or when pieces keep failing.
    """

    def trainable(point: dict[str, int], piece: Any, shared: dict[str, Any]) -> None:
        try:
            piece(point["number"], shared)
            tune.report({"mistake": ""})
        except UserError as error:  # Tune would run the piece again, to the same end
            tune.report({"mistake": str(error)})

    with tempfile.TemporaryDirectory() as scratch:
        outcome = tune.Tuner(
            tune.with_resources(tune.with_parameters(trainable, piece=piece, shared=shared), resources),
            param_space={"number": tune.grid_search(list(range(n_pieces)))},
            tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=at_once),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=scratch,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=max_failures),
                callbacks=[_OnDone(on_done)],
            ),
        ).fit()
    mistakes = [result.metrics.get("mistake", "") for result in outcome if result.metrics]
    if any(mistakes):
        raise UserError(next(mistake for mistake in mistakes if mistake))
    if outcome.num_errors:
        first = str(outcome.errors[0])
        raise UserError(
            f"{outcome.num_errors} of {n_pieces} trials failed; the first: {first}{_memory_advice(first)}"
        )


def _memory_advice(error: str) -> str:
    """What to do about a worker that Ray has killed for the memory it took; nothing for another error."""
    if "memory" not in error.lower():
        return ""
    return (
        "\nIf the node ran out of memory: lower resources.concurrent_trials or "
        "resources.memory_per_trial_gb, or raise finetune.gradient_accumulation where the backbone is trained"
    )


class _OnDone(tune.Callback):
    def __init__(self, on_done: Callable[[int], None]) -> None:
        self.on_done = on_done

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves its callbacks at the start, for a way to resume that is not used here

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.on_done(trial.config["number"])
