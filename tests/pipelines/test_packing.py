"""Cutting work for devices: whole groups where these are few, small pieces where they are many."""

import heapq
from collections.abc import Sequence

import pytest

from h2t.tasks import VTAB_1K
from pipelines.packing import pieces


def test_a_group_stays_whole_while_devices_are_few() -> None:
    groups = [["a1", "a2"], ["b1", "b2"], ["c1", "c2"], ["d1", "d2"]]
    assert pieces(groups, lambda unit: 1.0, slots=1, per_slot=4) == groups
    alone = [[unit] for group in groups for unit in group]
    assert pieces(groups, lambda unit: 1.0, slots=2, per_slot=4) == alone
    assert pieces(groups, lambda unit: 1.0, slots=2, per_slot=4, least=2.0) == groups
    assert pieces(groups, lambda unit: 0.0, slots=8, per_slot=4) == groups
    assert pieces([], lambda unit: 1.0, slots=8, per_slot=4) == []


def test_the_dearest_group_comes_first_and_keeps_its_order() -> None:
    groups = [[1.0, 1.0], [5.0, 9.0, 2.0], [3.0]]
    assert pieces(groups, float, slots=1, per_slot=2) == [[5.0], [9.0], [2.0], [3.0], [1.0, 1.0]]


def ends(costs: Sequence[float], slots: int) -> list[float]:
    """When each device is done, if one that has nothing to do takes the next piece."""
    times = [0.0] * slots
    for cost in costs:
        heapq.heapreplace(times, times[0] + cost)
    return times


@pytest.mark.parametrize(("slots", "idle"), [(1, 0.0), (8, 0.02), (64, 0.06)])
def test_on_the_whole_benchmark_no_device_waits_longer_than_a_piece_takes(slots: int, idle: float) -> None:
    """The paper's grid on the 19 tasks of VTAB at its three target sizes, five folds each."""
    groups = [
        [steps * size * task.n_classes for steps in (500, 5000) for _ in range(18)]
        for task in VTAB_1K
        for size in (512, 8192, 24576)
        for _ in range(5)
    ]
    costs = [sum(piece) for piece in pieces(groups, float, slots, per_slot=2)]
    assert sum(costs) == sum(map(sum, groups))
    times = ends(costs, slots)
    assert max(times) - min(times) <= max(costs)
    assert 1 - sum(times) / (slots * max(times)) <= idle
