"""Figure 7, left: the features that Head2Toe keeps on one task, used for another."""

from dataclasses import replace

from pipelines.scope import EVERYTHING, Scope
from pipelines.variants import Facts, Study, Variant


def variants(facts: Facts) -> list[Variant]:
    """Final heads on the features kept on every task, with the rate and the steps chosen for this one."""
    name = facts.task.name
    own = facts.chosen[name]["head2toe"]
    others = {task: points["head2toe"] for task, points in facts.chosen.items()}
    return [
        Variant(
            task,
            # The kept features are of the other's target size.
            (replace(other, learning_rate=own.learning_rate, steps=own.steps),),
            EVERYTHING if task == name else Scope(kept_on=task),
            x=position,
            reference="" if task == name else name,
        )
        for position, (task, other) in enumerate(others.items())
    ]


STUDY = Study(variants, needs=("head2toe",))
