"""Metrics of a finished run, or of its adapter folder, on other rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rolora.algorithm.adapter import AdapterState
from rolora.algorithm.method import Method
from rolora.config.load import make_config
from rolora.config.schema import RunConfig
from rolora.data import tables
from rolora.errors import ConfigError
from rolora.model.peft import read_adapter
from rolora.run.experiment import Experiment
from rolora.tasks.registry import Label


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter folder and what it was trained with; nothing is loaded yet."""

    folder: Path
    config: RunConfig
    labels: tuple[Label, ...]

    def load(self) -> tuple[Experiment, AdapterState]:
        """The experiment with its base model, and the adapter. ConfigError if they do not fit."""
        base = Experiment(self.config, labels=self.labels).load_base()
        experiment = Experiment(self.config, labels=self.labels, base=base)
        return experiment, read_adapter(self.folder, base.specs, any_rank=True)


def find_adapter(
    path: str | Path, model: str | None = None, overrides: Sequence[str] = ()
) -> TrainedAdapter:
    """The adapter of a finished run, or of its adapter folder.

    ``model`` names the base model where it has moved; ``overrides`` change the configuration that
    the adapter was trained with. Raises ConfigError for a folder that is neither, or damaged, and
    for a method that leaves a part of each adapter with its client.
    """
    folder = Path(path)
    folder = folder / "adapter" if (folder / "config.toml").is_file() else folder
    file = folder / "rolora.json"
    if not file.is_file():
        raise ConfigError(
            f"{folder} is not an adapter of rolora: rolora.json is missing; "
            "if its run is unfinished, continue it with: rolora resume"
        )
    try:
        notes = json.loads(file.read_text())
        settings, root, labels = notes["config"], Path(notes["root"]), tuple(notes["labels"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is damaged: {error!r}") from None
    moved = [] if model is None else [f"model.path={Path(model).resolve()}"]
    config = make_config(settings, [*moved, *overrides], root=root)
    _refuse_parts(Experiment(config).method, folder)
    return TrainedAdapter(folder, config, labels)


def _refuse_parts(method: Method, folder: Path) -> None:
    """ConfigError for a method whose adapter folder holds a model that no client has."""
    if method.personal_roles:
        kept = "+".join(sorted(method.personal_roles))
        raise ConfigError(
            f"{folder} holds only the server's part of {method.name}; each client keeps its own "
            f"{kept}. The run's report has the mean over the clients' adapters, on the rows of "
            "data.test or data.client_test"
        )


def evaluate_adapter(
    path: str | Path, source: str, model: str | None = None, overrides: Sequence[str] = ()
) -> dict[str, float]:
    """Metrics of a finished run, or of its adapter folder, on other rows.

    See :func:`find_adapter` for the arguments. Raises ConfigError for a folder that is neither,
    DataError for rows that do not fit.
    """
    ((_, metrics),) = evaluate_each(path, {source: source}, model, overrides)
    return dict(metrics)


def evaluate_each(
    path: str | Path,
    sources: Mapping[str, str],
    model: str | None = None,
    overrides: Sequence[str] = (),
) -> Iterator[tuple[str, Mapping[str, float]]]:
    """Name and metrics of each of several sources of rows; see :func:`evaluate_adapter`.

    All sources are read before the model is loaded, and it is loaded once.
    """
    trained = find_adapter(path, model, overrides)
    split, offline = trained.config.data.test_split, trained.config.offline
    read = {
        name: tables.read_table(source, root=Path(), split=split, offline=offline)
        for name, source in sources.items()
    }
    experiment, adapter = trained.load()
    for name, table in read.items():
        examples = experiment.task.encode_test(table, sources[name])
        yield name, experiment.score(examples, adapter)
