"""A comparison's folder: what it is of, what was chosen, its runs; to be left and taken up again.

``comparison.json`` says what the folder is of, ``tuning.json`` what was chosen and why. Each run is
a run folder of its own, those of the tuning stage below ``tuning/``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rolora.comparison.budget import Tally
from rolora.comparison.grid import Comparison, PlannedRun
from rolora.errors import ConfigError, DataError
from rolora.files import locked, new_folder, write_file
from rolora.results.runs import flat, load_run
from rolora.results.tuned import Tuning
from rolora.run.experiment import Experiment
from rolora.run.folder import RunFolder
from rolora.run.shards import digest


@dataclass(frozen=True)
class ComparisonFolder:
    """Where a comparison is on disk."""

    path: Path

    @property
    def report(self) -> Path:
        """The page about all runs of the table."""
        return self.path / "report.html"

    @property
    def tuning_file(self) -> Path:
        """The choice; once it is there, the tuning runs are not looked at again."""
        return self.path / "tuning.json"

    @contextlib.contextmanager
    def opened(self, comparison: Comparison) -> Iterator[None]:
        """Make the folder, or take it up if it is of this very comparison; hold it.

        ConfigError, one line, that names what differs, or says that another process is at it.
        """
        rows = digest(Experiment(comparison.config).rows)
        text = json.dumps({**comparison.record(), "rows": rows}, indent=1)
        file = self.path / "comparison.json"
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with new_folder(self.path) as part:
                (part / file.name).write_text(text + "\n")
        elif not file.is_file():
            raise ConfigError(f"{self.path} exists and is no comparison: name another with --out")
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(locked(self.path / ".lock"))
            except BlockingIOError:
                raise ConfigError(f"{self.path} is in use by another process") from None
            self._refuse_another(_read_json(file), json.loads(text))
            yield

    def _refuse_another(self, begun: dict[str, Any], wanted: dict[str, Any]) -> None:
        was, now = dict(flat(begun)), dict(flat(wanted))
        keys = [key for key in dict.fromkeys([*was, *now]) if was.get(key) != now.get(key)]
        if keys == ["rows"]:
            raise ConfigError(
                "the rows of data.train, data.test or data.validation changed since "
                f"{self.path} was begun: change them back, or begin anew with another --out"
            )
        if keys:
            first = [
                f"{k} is {was.get(k, 'unset')} there, {now.get(k, 'unset')} here" for k in keys
            ]
            more = f" (and {len(keys) - 2} more)" if len(keys) > 2 else ""
            raise ConfigError(
                f"{self.path} is of another comparison: {'; '.join(first[:2])}{more}. Give the "
                "same settings to go on with it, or name another folder with --out"
            )

    def tuning(self) -> Tuning | None:
        """What was chosen, if it was. DataError if the file is damaged."""
        if not self.tuning_file.is_file():
            return None
        try:
            return Tuning.model_validate_json(self.tuning_file.read_text(encoding="utf-8"))
        except ValueError as error:
            said = " ".join(str(error).split())[:120]
            raise DataError(f"{self.tuning_file} is damaged: {said}") from None

    def write_tuning(self, tuning: Tuning) -> None:
        """Put the choice on disk."""
        write_file(self.tuning_file, tuning.model_dump_json(indent=1) + "\n")

    def ended(self, planned: PlannedRun) -> bool:
        """Whether this run is done, or needed no more."""
        chosen = planned.stage == "tuning" and self.tuning_file.is_file()
        return chosen or RunFolder(planned.path).ended


def tally(every: Sequence[PlannedRun]) -> Tally:
    """Of all rounds of these runs that are on disk."""
    total = Tally()
    for one in every:
        # the last line of a run that is not finished may be cut off; it is then not counted
        with contextlib.suppress(DataError, ConfigError):
            total = total.with_run(load_run(one.path))
    return total


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise DataError(f"{file} is damaged: name another folder with --out") from None
    return found
