"""The columns of a table by their usual names."""

from collections.abc import Sequence

from h2t.errors import UserError, unknown


def find_column(names: Sequence[str], origin: str, stated: str, usual: Sequence[str], option: str) -> str:
    """The stated column, or the first of the usual ones that is there.

    ``option``: what states it. Raises UserError where there is none.
    """
    if stated and stated not in names:
        raise unknown(f"column of {origin}", stated, names)
    found = stated or next((name for name in usual if name in names), "")
    if not found:
        raise UserError(
            f"{origin} has the columns {', '.join(names)}: expected one of {', '.join(usual)}; or say which "
            f"with images.options.{option}"
        )
    return found
