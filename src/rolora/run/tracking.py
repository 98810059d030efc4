"""A run's rounds in experiment trackers: trackio, TensorBoard, Weights & Biases, MLflow.

A tracker changes nothing in a run, and its failure never ends one. It gets each round of
``rounds.jsonl`` once; after a resume also those that it has missed.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import secrets
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from rolora.config.schema import RunConfig, TrackConfig
from rolora.errors import ConfigError, one_line
from rolora.files import write_file
from rolora.results.runs import flatten, load_run
from rolora.run.folder import RunFolder

PARAMS = 100  # MLflow takes so many in one call
# of MLflow, by default, for a server that is not there: it would keep a run waiting for minutes
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}

_log = logging.getLogger(__name__)


class Tracked(NamedTuple):
    """What a tracker is told of a run when it is opened; ``config`` has dotted keys."""

    project: str
    name: str
    config: dict[str, Any]
    folder: Path


@dataclass(frozen=True)
class Tracker:
    """A run in a tracker, open for more rounds.

    ``last`` is the last round that the tracker already has (-1: none), ``log`` takes a round's
    scalars and its number, ``close`` whether the run has reached its end.
    """

    last: int
    log: Callable[[dict[str, float], int], None]
    close: Callable[[bool], object]

    def tell(self, line: Mapping[str, Any]) -> None:
        """Log a line of ``rounds.jsonl``, unless the tracker has it."""
        if line["round"] > self.last:
            self.log(scalars(line), line["round"])


def _trackio(library: Any, run: Tracked) -> Tracker:
    opened = library.init(
        run.project,
        run.name,
        config=run.config,
        resume="allow",
        auto_log_cpu=False,
        auto_log_gpu=False,
    )
    last = opened._next_step - 1  # no public name says it
    return Tracker(last, opened.log, lambda ended: library.finish())


def _tensorboard(library: Any, run: Tracked) -> Tracker:
    folder = run.folder / "tensorboard"
    shutil.rmtree(folder, ignore_errors=True)  # what it has is written again: all rounds, once
    writer = library.SummaryWriter(str(folder))
    lines = [f"    {key} = {value}\n" for key, value in run.config.items()]  # four spaces: as it is
    writer.add_text("config", "".join(lines))

    def log(scalars: dict[str, float], round: int) -> None:
        for name, value in scalars.items():
            writer.add_scalar(name, value, round)
        writer.flush()

    return Tracker(-1, log, lambda ended: writer.close())


def _wandb(library: Any, run: Tracked) -> Tracker:
    logged_in = library.login(prompt=False, verify=False)
    mode = os.environ.get("WANDB_MODE") or ("online" if logged_in else "offline")
    opened = library.init(
        project=run.project,
        id=run.name,
        name=run.name,
        config=run.config,
        dir=run.folder,
        mode=mode,
        resume="allow" if mode == "online" else None,
        settings=library.Settings(console="off", save_code=False),
    )
    return Tracker(opened.step - 1, opened.log, lambda ended: opened.finish(0 if ended else 1))


def _mlflow(library: Any, run: Tracked) -> Tracker:
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    client = library.MlflowClient()
    known = client.get_experiment_by_name(run.project)
    experiment = known.experiment_id if known else client.create_experiment(run.project)
    if found := client.search_runs([experiment], f"attributes.run_name = '{run.name}'"):
        id, last = found[0].info.run_id, -1
        client.update_run(id, status="RUNNING")
        last = max((one.step for one in client.get_metric_history(id, "bytes_up")), default=-1)
    else:
        id, last = client.create_run(experiment, run_name=run.name).info.run_id, -1
        params = [library.entities.Param(key, str(value)) for key, value in run.config.items()]
        for start in range(0, len(params), PARAMS):
            client.log_batch(id, params=params[start : start + PARAMS])

    def log(scalars: dict[str, float], round: int) -> None:
        now = int(time.time() * 1000)
        metrics = [library.entities.Metric(*one, now, round) for one in scalars.items()]
        client.log_batch(id, metrics=metrics)

    def close(ended: bool) -> None:
        client.set_terminated(id, "FINISHED" if ended else "KILLED")

    return Tracker(last, log, close)


# name -> the module to import, what to install for it, what opens a run there
TRACKERS: dict[str, tuple[str, str, Callable[[Any, Tracked], Tracker]]] = {
    "trackio": ("trackio", "'rolora[track]'", _trackio),
    "tensorboard": ("torch.utils.tensorboard", "tensorboard", _tensorboard),
    "wandb": ("wandb", "wandb", _wandb),
    "mlflow": ("mlflow", "mlflow", _mlflow),
}


def require_trackers(track: TrackConfig) -> None:
    """ConfigError, which says what to install, for a tracker whose library cannot be imported."""
    for name in track.trackers:
        module, install, _ = TRACKERS[name]
        try:
            import_module(module)
        except ImportError as error:
            raise ConfigError(
                f"track.to = {name!r} needs a library: pip install {install} ({one_line(error)})"
            ) from None


@contextlib.contextmanager
def tracking(config: RunConfig, folder: RunFolder) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """What takes each new line of ``rounds.jsonl`` to the trackers of ``track.to``.

    They first get the lines that they lack. One that fails is left alone from then on, with a
    warning. For who holds the folder's lock.
    """
    opened: dict[str, Tracker] = {}
    for name in config.track.trackers:
        with _harmless(name):
            opened[name] = _open(name, config, folder)

    def tell(line: Mapping[str, Any]) -> None:
        for key in list(opened):
            tracker = opened.pop(key)
            with _harmless(key):
                tracker.tell(line)
                opened[key] = tracker

    ended = False
    try:
        yield tell
        ended = True
    finally:
        for key, tracker in opened.items():
            with _harmless(key):
                tracker.close(ended)


def _open(name: str, config: RunConfig, folder: RunFolder) -> Tracker:
    """The run in this tracker, which has all lines of ``rounds.jsonl``."""
    module, _, opener = TRACKERS[name]
    run, project = load_run(folder.path), config.track.project or config.name
    told = Tracked(project, _name(folder), dict(flatten(run.config)), folder.path)
    tracker = opener(import_module(module), told)
    for line in run.rounds:
        tracker.tell(line)
    return tracker


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of ``rounds.jsonl`` that trackers show."""
    found = {
        "train/loss": line["loss"],
        **{f"eval/{name}": value for name, value in line["metrics"].items()},
        **{f"validation/{name}": value for name, value in line.get("validation", {}).items()},
        **{
            f"layers/{name}": statistics.median(value for value in own if value is not None)
            for name, own in line.get("layers", {}).items()
        },
        "aggregation_error": line["aggregation_error"],
        "bytes_up": line["bytes_up"],
        "bytes_down": line["bytes_down"],
        "rejected": len(line["rejected"]),
        "missing": len(line.get("missing", {})),
    }
    return {
        name: float(value)
        for name, value in found.items()
        if value is not None and math.isfinite(value)
    }


def _name(folder: RunFolder) -> str:
    """The run's name in trackers: the folder's, in letters that all take, with a random end."""
    if not folder.tracked_as.is_file():
        plain = re.sub(r"[^\w.=+-]", "-", folder.path.resolve().name)[:80]
        write_file(folder.tracked_as, f"{plain}-{secrets.token_hex(3)}\n")
    return folder.tracked_as.read_text().strip()


@contextlib.contextmanager
def _harmless(name: str) -> Iterator[None]:
    """An error in the block becomes a warning; what the tracker prints goes to standard error."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except Exception as error:
        _log.warning(
            "tracking with %s has stopped (%s: %s); the run goes on, and a resume logs the rounds "
            "that are missing",
            *(name, type(error).__name__, one_line(error)),
        )
