"""Metrics of a finished run, or of its adapter folder, on other rows."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rolora.algorithm.adapter import AdapterState
from rolora.config.load import make_config
from rolora.data import tables
from rolora.errors import ConfigError, ModelNotHere
from rolora.model.base import Base, tokenizer_digest
from rolora.model.peft import read_adapter
from rolora.run.experiment import Experiment
from rolora.training.engine import Evaluation


def evaluate_adapter(
    path: str | Path, source: str, model: str | None = None, overrides: Sequence[str] = ()
) -> dict[str, float]:
    """Metrics of a finished run, or of its adapter folder, on other rows.

    ``model`` names the base model where it has moved; ``overrides`` change the configuration that
    the adapter was trained with. Raises ConfigError for a folder that is neither, or damaged, for a
    base or tokenizer that is not the one of the training, and for a method that leaves a part of
    each adapter with its client; DataError for rows that do not fit.
    """
    ((_, found),) = evaluate_each(path, {source: source}, model, overrides)
    return dict(found.metrics)


def evaluate_each(
    path: str | Path,
    sources: Mapping[str, str],
    model: str | None = None,
    overrides: Sequence[str] = (),
    notify: Callable[[str], None] = lambda line: None,
) -> Iterator[tuple[str, Evaluation]]:
    """Name, metrics and recall of each of several sources of rows; see :func:`evaluate_adapter`.

    All sources are read before the model is loaded, and it is loaded once. ``notify`` is told
    in which dtype it computes.
    """
    experiment, adapter, read = load_trained(path, sources, model, overrides, notify)
    for name, table in read.items():
        examples = experiment.task.encode_test(table, sources[name])
        yield name, experiment.score(examples, adapter)


def load_trained(
    path: str | Path,
    sources: Mapping[str, str],
    model: str | None,
    overrides: Sequence[str],
    notify: Callable[[str], None] = lambda line: None,
) -> tuple[Experiment, AdapterState, dict[str, Any]]:
    """A finished run's experiment and adapter, and the rows of each source, which are read first.

    See :func:`evaluate_adapter` and :func:`evaluate_each`.
    """
    folder = adapter_folder(path)
    notes = read_notes(folder)
    trained = _trained(folder, notes, model, overrides)
    config = trained.config
    read = {
        name: tables.read_table(
            source,
            root=Path(),
            split=config.data.test_split,
            offline=config.offline,
            form=config.data.form,
        )
        for name, source in sources.items()
    }
    base = _load_base(folder, notes, trained)
    if sources and trained.kind.compares and trained.init_hash != notes.get("init_from", ""):
        raise ConfigError(
            f"{trained.config.lora.init_from} is not the adapter that {folder} was trained from, "
            "with which its outputs are compared: give that one with lora.init_from=FOLDER"
        )
    experiment = Experiment(config, labels=trained.labels, base=base)
    notify(f"computing in {experiment.dtype} (set model.dtype to change it)")
    return experiment, read_adapter(folder, base.specs, any_rank=True), read


def adapter_folder(path: str | Path) -> Path:
    """The adapter folder that is at ``path``, or in the run folder there."""
    folder = Path(path)
    return folder / "adapter" if (folder / "config.toml").is_file() else folder


def _load_base(folder: Path, notes: Mapping[str, Any], trained: Experiment) -> Base:
    """The base model for this adapter. ConfigError unless its weights are those of the training.

    They are compared in the dtype of the training, of which the hash was taken.
    """
    try:
        base = trained.load_base()
    except ModelNotHere as error:
        error.add_note("if it has moved, name its new place with --model")
        raise
    dtype = notes["config"]["model"]["dtype"]
    compared = base
    if trained.config.model.dtype != dtype:
        model = trained.config.model.model_copy(update={"dtype": dtype})
        compared = Experiment(
            trained.config.model_copy(update={"model": model}), labels=trained.labels
        ).load_base()
    found = {"base": compared.digest, "tokenizer": tokenizer_digest(compared)}
    for key, what in {"base": "other weights", "tokenizer": "another tokenizer"}.items():
        if found[key] != notes[key]:
            raise ConfigError(
                f"{trained.config.model.path} has {what} than the base that {folder} was trained "
                "on: give that base with --model"
            )
    return base


def read_notes(folder: Path) -> dict[str, Any]:
    """What the run that left the adapter wrote about it. ConfigError if it is not there."""
    file = folder / "rolora.json"
    if not file.is_file():
        run = folder.parent
        unfinished = (run / "config.toml").is_file()
        hint = f"; finish its run with: rolora resume {shlex.quote(str(run))}" if unfinished else ""
        raise ConfigError(f"{folder} is not an adapter of rolora: rolora.json is missing{hint}")
    try:
        notes: dict[str, Any] = json.loads(file.read_text())
        for key, kind in _NOTES.items():
            if not isinstance(notes[key], kind):
                raise TypeError(f"{key} is {notes[key]!r}")
        for key in ("task", "dtype"):  # whose defaults would be another run's
            if not isinstance(value := notes["config"]["model"][key], str):
                raise TypeError(f"model.{key} is {value!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is damaged: {error!r}") from None
    return notes


_NOTES = {"config": dict, "root": str, "labels": list, "base": str, "tokenizer": str}


def _trained(
    folder: Path, notes: Mapping[str, Any], model: str | None, overrides: Sequence[str]
) -> Experiment:
    """The experiment that the adapter in this folder comes from; nothing is loaded yet."""
    settings, labels = notes["config"], tuple(notes["labels"])
    root = folder.resolve() / notes["root"]
    moved = [] if model is None else [f"model.path={Path(model).resolve()}"]
    own = make_config(settings, moved, root=root)
    trained = Experiment(make_config(settings, [*moved, *overrides], root=root), labels=labels)
    places = {"init_from": own.lora.init_from}
    if trained.config.lora.model_copy(update=places) != own.lora:
        raise ConfigError(f"the keys of [lora] are those of {folder} and cannot be changed")
    method = trained.method
    if method.personal_roles:
        kept = "+".join(sorted(method.personal_roles))
        raise ConfigError(
            f"{folder} holds only the server's part of {method.name}; each client keeps its own "
            f"{kept}. The run's report has the mean over the clients' adapters, on the rows of "
            "data.test or data.client_test"
        )
    return trained
