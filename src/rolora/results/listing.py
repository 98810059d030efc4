"""Which runs are in a folder, and how far each is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from rolora.errors import ConfigError, DataError, RoloraError
from rolora.files import is_locked
from rolora.results.runs import load_run, primary_metric

State = Literal["finished", "running", "not finished", "diverged", "unreadable"]
PARTS = {"config.toml", "rounds.jsonl", "partition.json"}


@dataclass(frozen=True)
class Listed:
    """A run folder in a list. ``last`` and ``best`` are scores (see ``RunRecord.scores``), None
    before the first evaluation; ``changed`` is when its last round ended; ``reason`` says why an
    unreadable one is, or where a diverged one did."""

    path: Path
    state: State
    reason: str = ""
    name: str = ""
    method: str = ""
    seed: int = 0
    round: int = 0
    rounds: int = 0
    metric: str = ""
    last: float | None = None
    best: float | None = None
    changed: datetime | None = None

    @property
    def how_far(self) -> str:
        """Its state and rounds in words."""
        if self.state == "unreadable":
            return f"unreadable: {self.reason}"
        if self.state == "finished":
            return f"finished, {self.round} rounds"
        return f"{self.state}, round {self.round} of {self.rounds}"


def list_runs(folder: Path) -> list[Listed]:
    """All run folders in and below ``folder``, the latest last. ConfigError if it is no folder."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder: name the one that your runs are in")
    found = list(_found(folder))
    return sorted(found, key=lambda one: (one.changed or datetime.min, one.path))


def _found(folder: Path) -> Iterator[Listed]:
    """Folders with a part of a run; those below one are its own. Hidden ones are half written."""
    closed: list[OSError] = []
    for place, below, files in os.walk(folder, onerror=closed.append):
        if PARTS & set(files):
            below.clear()
            yield listed(Path(place))
        below[:] = [name for name in below if not name.startswith(".")]
    for error in closed:
        yield _closed(Path(error.filename), error)


def listed(path: Path) -> Listed:
    """How far the run in this folder is; an unreadable one raises nothing."""
    try:
        run = load_run(path)
        try:
            metric = primary_metric([run])
        except DataError:  # nothing is evaluated yet
            metric = ""
        values = [point.value for point in run.scores(metric)] if metric else []
        changed = datetime.fromtimestamp((path / "rounds.jsonl").stat().st_mtime)
        running = is_locked(path / ".lock")
    except RoloraError as error:
        return Listed(path, "unreadable", str(error))
    except OSError as error:
        return _closed(path, error)
    state: State = "finished" if (path / "report.html").is_file() else "not finished"
    if run.diverged is not None:
        state = "diverged"
    return Listed(
        path,
        "running" if running else state,
        run.diverged or "",
        run.name,
        run.method,
        run.seed,
        run.done,
        run.planned,
        metric,
        values[-1] if values else None,
        run.best(metric) if metric else None,
        changed.replace(microsecond=0),
    )


def _closed(path: Path, error: OSError) -> Listed:
    return Listed(path, "unreadable", f"{path}: {os.strerror(error.errno or 0)}")
