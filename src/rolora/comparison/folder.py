"""A comparison's folder, from which a stopped comparison continues.

``comparison.json`` records what is compared, ``tuning.json`` what was chosen and why. Each run is a
run folder of its own; the tuning runs are in ``tuning/``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rolora.comparison.budget import Timing
from rolora.comparison.grid import Comparison, PlannedRun
from rolora.errors import ConfigError, DataError
from rolora.files import locked, new_folder, write_file
from rolora.results.runs import flatten, load_run, read_json
from rolora.results.tuned import Tuning
from rolora.run.experiment import Experiment
from rolora.run.folder import RunFolder
from rolora.run.settings import dated
from rolora.run.shards import digest


@dataclass(frozen=True)
class ComparisonFolder:
    """A comparison on disk."""

    path: Path

    @property
    def file(self) -> Path:
        """What is compared."""
        return self.path / "comparison.json"

    @property
    def report(self) -> Path:
        """The page about all final runs."""
        return self.path / "report.html"

    @property
    def tuning_file(self) -> Path:
        """The choice; once it exists, the tuning runs are no longer needed."""
        return self.path / "tuning.json"

    def dated(self, comparison: Comparison) -> Comparison:
        """The comparison on the date that it was started on, which chat templates are given."""
        begun = read_json(self.file, dict[str, Any], {})
        day = dict(flatten(begun)).get("data.date")
        return replace(comparison, config=dated(comparison.config, day))

    @contextlib.contextmanager
    def opened(self, comparison: Comparison) -> Iterator[None]:
        """Make the folder, or continue it if it is of the same comparison, and hold its lock.

        ConfigError if it is of another comparison, or in use by another process.
        """
        rows = digest(Experiment(comparison.config).rows)
        text = json.dumps({**comparison.record(), "rows": rows}, indent=1)
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with new_folder(self.path) as part:
                (part / self.file.name).write_text(text + "\n")
        elif not self.file.is_file():
            raise ConfigError(f"{self.path} exists and is not a comparison: choose another --out")
        with locked(self.path / ".lock"):
            self._refuse_another(read_json(self.file, dict[str, Any], {}), json.loads(text))
            yield

    def _refuse_another(self, begun: dict[str, Any], wanted: dict[str, Any]) -> None:
        was, now = dict(flatten(begun)), dict(flatten(wanted))
        keys = [key for key in dict.fromkeys([*was, *now]) if was.get(key) != now.get(key)]
        if keys == ["rows"]:
            raise ConfigError(
                "the rows of data.train, data.test, data.second_test or data.validation changed "
                f"since {self.path} was started: restore them, or choose another --out"
            )
        if keys:
            first = [
                f"{k} is {was.get(k, 'unset')} there, {now.get(k, 'unset')} here" for k in keys[:2]
            ]
            more = f" (and {len(keys) - 2} more)" if len(keys) > 2 else ""
            raise ConfigError(
                f"{self.path} is of another comparison: {'; '.join(first)}{more}. Give the same "
                "settings to continue it, or choose another --out"
            )

    def tuning(self) -> Tuning | None:
        """The choice, if it has been made. DataError if the file is damaged."""
        return read_json(self.tuning_file, Tuning, None)

    def write_tuning(self, tuning: Tuning) -> None:
        """Save the choice."""
        write_file(self.tuning_file, tuning.model_dump_json(indent=1) + "\n")

    def ended(self, planned: PlannedRun) -> bool:
        """Whether this run is done, or no longer needed."""
        chosen = planned.stage == "tuning" and self.tuning_file.is_file()
        return chosen or RunFolder(planned.path).ended


def rounds_done(runs: Iterable[PlannedRun]) -> list[Timing]:
    """All rounds of these runs that are on disk."""
    done = []
    for planned in runs:
        # the last line of an unfinished run may be cut off; the run is then not counted
        with contextlib.suppress(DataError, ConfigError):
            lines = load_run(planned.path).rounds
            done += [Timing(x["round"], bool(x["metrics"]), x["seconds"]) for x in lines]
    return done
