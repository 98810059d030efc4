"""Tasks of lm-evaluation-harness, asked of a base model with an adapter: its only importer.

The harness writes prompts and scores answers; the model is the one that every other command loads
(safetensors or GGUF, no remote code), with the adapter in its bank.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rolora.data.examples import tokenizer_limit
from rolora.data.hub import hub_alone, told_offline
from rolora.errors import ConfigError, DataError, NotHere, RoloraError, nearest, one_line
from rolora.run.evaluation import TrainedAdapter
from rolora.tasks.registry import task_kind

BATCH = 8  # rows; a base of 7 billion weights takes so many of 2,048 tokens on one large GPU
SEED = 1234  # the harness's own, of the examples that it puts before a question


@dataclass(frozen=True)
class Score:
    """A metric of a task, or of a group of tasks, over ``rows`` rows; ``stderr``: its standard
    error, or None where the harness gives none."""

    task: str
    metric: str
    value: float
    stderr: float | None
    rows: int


def require_harness() -> None:
    """Raise ConfigError where the harness is not installed."""
    if not all(importlib.util.find_spec(name) for name in ("lm_eval", "accelerate")):
        raise ConfigError("--tasks needs lm-evaluation-harness: pip install 'rolora[harness]'")


def run_tasks(
    trained: TrainedAdapter,
    names: Sequence[str],
    folder: Path | None = None,
    limit: int | None = None,
    allow_code: bool = False,
) -> list[Score]:
    """What the harness measures for these of its tasks, groups or tags, in its order.

    ``folder`` holds task files of one's own, which are looked at first; ``limit`` takes the first
    rows of each task. Only with ``allow_code`` does any program run that a model has written, or
    that the hub gives for a metric. Tasks and their rows are loaded before the model. Raises
    ConfigError for an unknown task, or one that needs ``allow_code``; NotHere for rows that are not
    on this machine where the hub does not answer.
    """
    require_harness()
    if task_kind(trained.config.model.task).labelled:
        raise ConfigError(
            f"{trained.folder} classifies: the harness asks language models (causal_lm, choice)"
        )
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"the folder {folder} does not exist (--task-folder)")
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    alone = hub_alone(trained.config.offline)
    with _quiet(), _seeded(), told_offline(alone):
        with _programs(allow_code, alone):
            manager = _manager(names, folder)
            _refuse_programs(manager.task_index, names, allow_code)
            tasks = [task for name in names for task in _load(manager, name, alone)]
        experiment, adapter = trained.load()
        base = experiment.base
        room = tokenizer_limit(base.tokenizer, base.model.config, 1 << 30)
        with (
            _programs(allow_code, alone),
            _one_line("the harness failed"),
            base.holding(adapter),
        ):
            model = HFLM(
                base.model,
                tokenizer=base.tokenizer,
                backend="causal",
                batch_size=BATCH,
                max_length=room,
            )
            asked = manager.load(tasks)
            for task in asked["tasks"].values():
                if task.get_config("num_fewshot") is None:
                    task.set_config("num_fewshot", 0)
                task.set_fewshot_seed(SEED)
            found = evaluate(
                model,
                asked,
                limit=limit,
                bootstrap_iters=1000,
                log_samples=False,
                fewshot_as_multiturn=True,
                confirm_run_unsafe_code=allow_code,
            )
    return list(_scores(found))


def _manager(names: Sequence[str], folder: Path | None) -> Any:
    """A task manager that knows these names. The harness's own files take it many seconds to read,
    so they are left alone where ``folder`` has all that is asked for."""
    from lm_eval.tasks import TaskManager

    if folder is not None:
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        if set(names) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=None if folder is None else str(folder))
    for name in names:
        if name not in manager.task_index:
            hint = nearest(name, manager.all_tasks)
            known = "see the harness's own list" if hint.startswith("known") else hint
            raise ConfigError(f"the harness has no task {name!r}: {known}")
    return manager


def _refuse_programs(index: Mapping[str, Any], names: Sequence[str], allow_code: bool) -> None:
    unsafe = sorted(
        {
            str(task.get("task"))
            for name in names
            for task in _members(index, name)
            if task.get("unsafe_code")
        }
    )
    if unsafe and not allow_code:
        raise ConfigError(
            f"{', '.join(unsafe)} runs programs that the model writes, on this machine and as you: "
            "where you accept that, add --allow-code"
        )


def _members(index: Mapping[str, Any], wanted: Any) -> Iterator[Mapping[str, Any]]:
    """The settings of every task in a task, a tag or a group, whose members may be settings too."""
    if isinstance(wanted, str):
        entry = index.get(wanted)
        settings = {} if entry is None else entry.cfg or {"task": sorted(entry.tags)}
    else:
        settings = wanted
        yield from _members(index, str(wanted.get("group", wanted.get("task"))))
    members = settings.get("task")
    if not isinstance(members, list):
        yield settings
        return
    for member in members:
        yield from _members(index, member)


def _load(manager: Any, name: str, alone: bool) -> list[Any]:
    """The task, group, or the tasks of the tag, that this is the name of, with their rows."""
    try:
        loaded = manager.load([name])
    except ConnectionError as error:
        if not alone:
            raise DataError(f"the rows of task {name!r} did not come: {one_line(error)}") from error
        raise NotHere(
            f"the rows of task {name!r} are not on this machine, and the hub does not answer "
            f"({one_line(error)}): bring over the hub's cache of a machine where they were loaded, "
            "or name a task of your own that reads a file (--task-folder)",
            name,
        ) from error
    except RoloraError:
        raise
    except Exception as error:  # a task is a program of its author: it raises anything
        why = " (the hub does not answer)" if alone else ""
        raise DataError(f"task {name!r} cannot be loaded{why}: {one_line(error)}") from error
    return [loaded["groups"][name]] if name in loaded["groups"] else [*loaded["tasks"].values()]


def _scores(found: Any) -> Iterator[Score]:
    for task, metrics in found["results"].items():
        counts = found["n-samples"].get(task)
        rows = int(counts["effective"] if counts else metrics.get("sample_len", 0))
        for key, value in metrics.items():
            metric, comma, how = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            spread = metrics.get(f"{metric}_stderr,{how}")
            named = metric if how == "none" else f"{metric} ({how})"
            stderr = float(spread) if isinstance(spread, float | int) else None
            yield Score(task, named, float(value), stderr, rows)


@contextlib.contextmanager
def _programs(allowed: bool, alone: bool) -> Iterator[None]:
    """The ``evaluate`` library as it runs programs, or fetches none; ``alone``: asks nobody."""
    import evaluate

    refused: list[str] = []

    def refuse(path: str, *_: Any, **__: Any) -> None:
        refused.append(path)
        raise ConfigError(f"{path!r} is a program that is fetched from the hub and run here")

    offline = evaluate.config.HF_EVALUATE_OFFLINE
    evaluate.config.HF_EVALUATE_OFFLINE = offline or alone
    switch, load, before = "HF_ALLOW_CODE_EVAL", evaluate.load, os.environ.get("HF_ALLOW_CODE_EVAL")
    if allowed:
        os.environ[switch] = "1"
    else:
        evaluate.load = refuse
    try:
        yield
    except Exception:
        if not refused:
            raise
    finally:
        evaluate.load = load
        evaluate.config.HF_EVALUATE_OFFLINE = offline
        os.environ.pop(switch, None)
        if before is not None:
            os.environ[switch] = before
    if refused:  # the harness goes on without such a metric
        raise ConfigError(
            f"the metric {refused[0]!r} is a program that is fetched from the hub and run here: "
            "where you accept that, add --allow-code"
        )


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """The global generators as the harness's own program has them: some tasks draw from them."""
    from lm_eval.utils import set_torch_seed

    before = random.getstate()
    random.setstate(random.Random(0).getstate())
    try:
        with torch.random.fork_rng():
            set_torch_seed(SEED)
            yield
    finally:
        random.setstate(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness's bars stay, on standard error; its remarks and printing do not."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    try:
        yield
    except RoloraError:
        raise
    except Exception as error:  # its tasks, filters and metrics are programs of many authors
        raise RoloraError(f"{what}: {type(error).__name__}: {one_line(error)}") from error
