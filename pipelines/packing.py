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
    weighed = [[(cost(unit), unit) for unit in group] for group in groups]
    limit = max(sum(price for group in weighed for price, _ in group) / (slots * per_slot), least)
    cut = [_cut(group, limit) for group in weighed if group]
    cut.sort(key=lambda parts: -max(sum(price for price, _ in part) for part in parts))
    return [[unit for _, unit in part] for parts in cut for part in parts]


def _cut(group: list[tuple[float, Unit]], limit: float) -> list[list[tuple[float, Unit]]]:
    parts: list[list[tuple[float, Unit]]] = []
    room = 0.0
    for price, unit in group:
        room -= price
        if not parts or room < -ROUNDING * limit:
            parts.append([])
            room = limit - price
        parts[-1].append((price, unit))
    return parts
