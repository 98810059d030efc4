"""What a paper says of the methods that a configuration compares, to stand beside our numbers.

Beside ``NAME.toml`` may lie ``NAME.published.json``::

    {"source": "arXiv:2502.01755, table 1", "setting": "RoBERTa-Large, 50 clients, rank 4",
     "metric": "accuracy", "unit": "percent", "results": {"rolora": 94.80, "fedit": 93.00}}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rolora.errors import DataError
from rolora.results.runs import Run, by_method, mean_sd


class Published(BaseModel):
    """Published results of methods by name, in ``unit``; ``setting`` says what they were got in."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    setting: str
    metric: str
    unit: Literal["percent", "fraction"]
    results: Annotated[dict[str, float], Field(min_length=1)]

    @property
    def scale(self) -> float:
        """What our metrics are multiplied by to be in ``unit``."""
        return 100.0 if self.unit == "percent" else 1.0

    @property
    def digits(self) -> int:
        """Decimals that numbers in ``unit`` are shown with."""
        return 2 if self.unit == "percent" else 3


@dataclass(frozen=True)
class Beside:
    """Ours and theirs of one method, in the published unit; None for what there is not.

    Ours is the mean over seeds at the last evaluated round, and its sample sd.
    """

    method: str
    ours: float | None
    sd: float | None
    theirs: float | None

    def said(self, digits: int) -> tuple[str, str]:
        """Ours and theirs in words."""
        spread = "" if self.sd is None else f" ± {self.sd:.{digits}f}"
        ours = "not measured" if self.ours is None else f"{self.ours:.{digits}f}{spread}"
        return ours, "" if self.theirs is None else f"{self.theirs:.{digits}f}"


def read_published(config: str | Path) -> Published | None:
    """What lies beside this configuration; None if nothing does. DataError if it is damaged."""
    file = Path(config).expanduser().with_suffix(".published.json")
    if not file.is_file():
        return None
    try:
        return Published.model_validate_json(file.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        fault = error.errors()[0] if isinstance(error, ValidationError) else {"msg": "no UTF-8"}
        where = ".".join(map(str, fault.get("loc", ())))
        raise DataError(f"{file}: {where or 'it'}: {fault['msg']}") from None


def beside(published: Published, runs: Sequence[Run]) -> list[Beside]:
    """One row for each method that ran, then for each that was only published."""
    groups = by_method(runs)
    names = {method: str(own[0].config["method"]["name"]) for method, own in groups.items()}
    rows, found = [], set[str]()
    for method, own in groups.items():
        # a name that one row alone has stands for it whatever its options are
        plain = list(names.values()).count(names[method]) == 1
        key = names[method] if plain else method
        found.add(key)
        last = [curve[-1].value for run in own if (curve := run.curve(published.metric))]
        mean, sd = mean_sd(last) if len(last) == len(own) else (None, None)
        ours, spread = (None if x is None else x * published.scale for x in (mean, sd))
        rows.append(Beside(method, ours, spread, published.results.get(key)))
    rest = [Beside(m, None, None, x) for m, x in published.results.items() if m not in found]
    return rows + rest
