"""Numbered pieces of work on Ray Tune: what a user hears of pieces that fail."""

from typing import Any

import pytest

from h2t.errors import UserError
from pipelines.jobs import run_trials

pytestmark = pytest.mark.usefixtures("cluster")


def failing(number: int, shared: dict[str, Any]) -> None:
    if number in shared:
        raise RuntimeError(shared[number])


@pytest.mark.parametrize(
    ("reason", "advised"), [("no such file", False), ("the node ran low on memory", True)]
)
def test_a_piece_that_keeps_failing_is_one_message(reason: str, advised: bool) -> None:
    done: list[int] = []
    with pytest.raises(UserError, match=rf"1 of 2 trials failed; the first: (?s:.*){reason}") as caught:
        run_trials(
            failing,
            {0: reason},  # type: ignore[dict-item]
            2,
            resources={"cpu": 1},
            at_once=1,
            max_failures=0,
            on_done=done.append,
        )
    assert done == [1]
    assert ("lower resources.concurrent_trials" in str(caught.value)) is advised
