"""How work is cut for so many devices: into pieces so small that none waits long for the last one.

Units that share what they read are best done together, in one piece. So a piece is as large as that allows:
all units of a group, or no more than a share of what each device has to do.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

Unit = TypeVar("Unit")
ROUNDING = 1e-9


def pieces(
    groups: Iterable[Sequence[Unit]],
    cost: Callable[[Unit], float],
    slots: int,
    per_slot: int,
    least: float = 0.0,
) -> list[list[Unit]]:
    """Cut groups into pieces of consecutive units, those of the dearest group first.

    A piece costs at most what ``slots`` devices would have to do on average, divided by ``per_slot``, or is a
    single unit; no group is cut into pieces that cost less than ``least``.
    """
    listed = [list(group) for group in groups]
    limit = max(sum(cost(unit) for group in listed for unit in group) / (slots * per_slot), least)
    cut = [_cut(group, cost, limit) for group in listed if group]
    cut.sort(key=lambda parts: -max(sum(map(cost, part)) for part in parts))
    return [part for parts in cut for part in parts]


def _cut(group: list[Unit], cost: Callable[[Unit], float], limit: float) -> list[list[Unit]]:
    parts: list[list[Unit]] = []
    room = 0.0
    for unit in group:
        room -= cost(unit)
        if not parts or room < -ROUNDING * limit:
            parts.append([])
            room = limit - cost(unit)
        parts[-1].append(unit)
    return parts
