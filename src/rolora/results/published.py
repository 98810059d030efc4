"""Published results of the compared methods, to be shown beside ours.

They are read from ``NAME.published.json`` next to the configuration ``NAME.toml``::

    {"source": "arXiv:2502.01755, table 1", "setting": "RoBERTa-Large, 50 clients, rank 4",
     "metric": "accuracy", "unit": "percent", "results": {"rolora": 94.80, "fedit": 93.00}}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from rolora.files import from_home
from rolora.results.runs import RunRecord, by_method, over_seeds, read_json


class Published(BaseModel, frozen=True, extra="forbid"):
    """Published results by method, in ``unit``, and the setting they were measured in."""

    source: str
    setting: str
    metric: str
    unit: Literal["percent", "fraction"]
    results: Annotated[dict[str, float], Field(min_length=1)]

    @property
    def scale(self) -> float:
        """The factor that converts our metrics to ``unit``."""
        return 100.0 if self.unit == "percent" else 1.0

    @property
    def digits(self) -> int:
        """The number of decimals to show."""
        return 2 if self.unit == "percent" else 3


@dataclass(frozen=True)
class BesidePublished:
    """Our result and the published one of a method, in the published unit; None where missing.

    Ours is the mean over seeds of the last score, with the sample standard deviation.
    """

    method: str
    ours: float | None
    sd: float | None
    theirs: float | None

    def cells(self, digits: int) -> tuple[str, str]:
        """Our result and theirs as text."""
        spread = "" if self.sd is None else f" ± {self.sd:.{digits}f}"
        ours = "not measured" if self.ours is None else f"{self.ours:.{digits}f}{spread}"
        return ours, "" if self.theirs is None else f"{self.theirs:.{digits}f}"


def read_published(config: str | Path) -> Published | None:
    """The published results next to this configuration, if any. DataError for a damaged file."""
    file = from_home(config).with_suffix(".published.json")
    return read_json(file, Published, None)


def beside_published(published: Published, runs: Sequence[RunRecord]) -> list[BesidePublished]:
    """One row for each method that ran, then one for each that was only published."""
    groups = by_method(runs)
    names = {method: str(own[0].config["method"]["name"]) for method, own in groups.items()}
    rows, matched = [], set[str]()
    for method, own in groups.items():
        # options do not matter where only one group has this method's name
        unique = list(names.values()).count(names[method]) == 1
        key = names[method] if unique else method
        matched.add(key)
        mean, sd = over_seeds([run.last(published.metric) for run in own]) or (None, None)
        ours, spread = (None if x is None else x * published.scale for x in (mean, sd))
        rows.append(BesidePublished(method, ours, spread, published.results.get(key)))
    others = published.results.items()
    return rows + [BesidePublished(m, None, None, x) for m, x in others if m not in matched]
