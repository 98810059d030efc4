"""Class labels are text everywhere; this is their order, and the vocabulary of a run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from decimal import Decimal

from rolora.errors import DataError

WHOLE = re.compile(r"0|-?[1-9][0-9]*")


def label_name(value: object) -> str | None:
    """A cell as a class label: text as written, 2 and 2.0 as "2", True as "True".

    None for anything that is not a class: an empty cell, a number that is not whole, a list.
    """
    if isinstance(value, str):
        return value or None
    if isinstance(value, bool | int):
        return str(value)
    # float64 tells whole numbers apart up to 2^53
    if isinstance(value, float | Decimal) and -(2**53) < value < 2**53 and value == int(value):
        return str(int(value))
    return None


def in_order(names: Iterable[str]) -> list[str]:
    """The distinct names: whole numbers by value, then the others as text.

    The order follows from the set alone, so every machine that knows the names gives them the same
    places: "10" comes behind "9" whether or not some file also has "unknown". Only a number's usual
    form counts, so "007" is a name beside "7".
    """

    def place(name: str) -> tuple[bool, int, str]:
        whole = WHOLE.fullmatch(name) is not None
        # a number of thousands of digits is not one that Python reads
        return (False, int(name), "") if whole and len(name) < 1000 else (True, 0, name)

    return sorted(set(names), key=place)


def class_labels(names: Iterable[str], source: str, fewest: int = 2) -> list[str]:
    """The class labels of a run, in order, from the labels of all its training rows.

    Raises DataError if there are fewer than ``fewest``, or if they are numbers of which one is not
    whole: those are measured, not told apart.
    """
    found = in_order(names)
    if not found:
        raise DataError(f"{source} has no row with a label")
    if len(found) < fewest:
        raise DataError(
            f"{source} has only one label ({found[0]!r}); classification needs at least two"
        )
    values = [_number(name) for name in found]
    if all(value is not None for value in values):
        for name, value in zip(found, values, strict=True):
            if value is not None and not value.is_integer():
                raise not_a_class(source, f"a label is {name}")
    return found


def not_a_class(source: str, what: str) -> DataError:
    """The error for a number that is not whole among labels."""
    return DataError(
        f"{source}: {what}, but a class is a name or a whole number; model.task = 'regression' "
        "predicts numbers"
    )


def _number(name: str) -> float | None:
    try:
        value = float(name)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
