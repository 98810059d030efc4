"""How the settings of a comparison were chosen: the content of ``tuning.json``."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class Record(BaseModel, frozen=True, extra="forbid"):
    """A part of the file."""


class Trial(Record):
    """One setting, its result for each tuning seed (None: diverged), and their mean."""

    values: dict[str, str]
    scores: list[float | None]
    mean: float | None

    @property
    def result(self) -> str:
        """The mean as text."""
        return "diverged" if self.mean is None else f"{self.mean:.3f}"


class Tuned(Record):
    """All trials of a method, and its best values.

    ``at_edge`` names the keys whose best value is the smallest or largest of the grid, so that a
    better value may lie beyond it.
    """

    method: str
    trials: list[Trial]
    best: dict[str, str]
    at_edge: dict[str, Literal["smallest", "largest"]]

    @property
    def cautions(self) -> list[str]:
        """A sentence for each key whose grid may be too narrow."""
        return [
            f"{self.method}: the best {key}, {self.best[key]}, is the {end} value that was tried; "
            f"a {end.removesuffix('st')}r one may be better"
            for key, end in self.at_edge.items()
        ]


class Tuning(Record):
    """The tuning of a comparison; ``rows`` describes the rows that the metric was measured on."""

    metric: str
    rows: str
    seeds: list[int]
    rounds: int
    methods: list[Tuned]

    @property
    def keys(self) -> set[str]:
        """All keys that were tuned for a method."""
        return {key for tuned in self.methods for key in tuned.best}

    def best(self, method: str) -> tuple[str, ...]:
        """The best values of a method, as overrides."""
        (best,) = (tuned.best for tuned in self.methods if tuned.method == method)
        return tuple(f"{key}={value}" for key, value in best.items())
