"""How the settings of a comparison were chosen: what ``tuning.json`` holds."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """What is written to a file as it is."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Trial(Record):
    """One setting, its score for each tuning seed (None: diverged), and their mean."""

    values: dict[str, str]
    scores: list[float | None]
    mean: float | None

    @property
    def said(self) -> str:
        """Its score in words."""
        return "diverged" if self.mean is None else f"{self.mean:.3f}"


class Tuned(Record):
    """What was tried for a method, and the best; ``at_edge`` names the keys whose best value is
    the smallest or largest of the grid, so that a better one may lie beyond."""

    method: str
    trials: list[Trial]
    best: dict[str, str]
    at_edge: dict[str, Literal["smallest", "largest"]]

    @property
    def said(self) -> str:
        """The best values in words."""
        return ", ".join(f"{key} = {value}" for key, value in self.best.items())

    @property
    def cautions(self) -> list[str]:
        """A sentence for each key whose grid may be too narrow."""
        return [
            f"{self.method}: the best {key}, {self.best[key]}, is the {end} that was tried; "
            f"a {end.removesuffix('st')}r one may be better"
            for key, end in self.at_edge.items()
        ]


class Tuning(Record):
    """How the settings of a comparison were chosen; ``rows`` says on what, in words."""

    metric: str
    rows: str
    seeds: list[int]
    rounds: int
    methods: list[Tuned]

    @property
    def keys(self) -> set[str]:
        """All keys that were tuned for a method."""
        return {key for one in self.methods for key in one.best}

    def best(self, method: str) -> tuple[str, ...]:
        """The best setting of a method, as overrides."""
        (tuned,) = (one for one in self.methods if one.method == method)
        return tuple(f"{key}={value}" for key, value in tuned.best.items())
