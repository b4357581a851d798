"""Stage 2, Ray Tune: cross-validation of every method on frozen features, and the choice it makes."""

from collections.abc import Sequence
from functools import partial

from pipelines.artifacts import chosen_from_trials, trials, write_frame
from pipelines.choice import choose
from pipelines.cross_validation import make_trials
from pipelines.products import Files, TrialFiles
from pipelines.schemas import CHOSEN
from pipelines.session import Advance, Session, Step


def trial_products(session: Session) -> list[TrialFiles]:
    """The cross-validation of every task that has methods on frozen features."""
    return [product for task in session.tasks.values() if (product := trials(task)).trials]


def choice_products(session: Session) -> list[Files]:
    """The chosen hyperparameters of every task that has methods on frozen features."""
    return [product for task in session.tasks.values() if (product := chosen_from_trials(task)).units]


def make_choices(session: Session, tasks: Sequence[str], advance: Advance) -> None:
    """Choose the hyperparameters of every method of a task from its trials."""
    for task in map(session.tasks.__getitem__, tasks):
        (name,) = chosen_from_trials(task).units
        write_frame(session.run, name, CHOSEN, choose(trials(task).read(session.run)))


STEPS = (
    Step("sweep", "trials", trial_products, partial(make_trials, "sweep")),
    Step("choice", "choices", choice_products, make_choices, brief=True),
)
