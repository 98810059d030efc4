"""A finished run, or an adapter folder that a run left, measured on other rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rolora.algorithm.adapter import AdapterState
from rolora.config.load import make_config
from rolora.config.schema import RunConfig
from rolora.data import tables
from rolora.errors import ConfigError
from rolora.model.base import Base
from rolora.model.peft import read_adapter
from rolora.run.configured import load_base_for, make_method, make_task
from rolora.run.federation import score
from rolora.tasks.classification import Label


@dataclass(frozen=True)
class Trained:
    """What an adapter folder says of itself; nothing is loaded yet."""

    folder: Path
    config: RunConfig
    labels: tuple[Label, ...]

    def load(self) -> tuple[Base, AdapterState]:
        """The base model, and the adapter that fits it. ConfigError where it does not."""
        base = load_base_for(self.config, self.labels)
        return base, read_adapter(self.folder, base.specs, any_rank=True)


def find_adapter(
    path: str | Path, model: str | None = None, overrides: Sequence[str] = ()
) -> Trained:
    """The adapter of a finished run, or of an adapter folder that a run left.

    ``model`` names the base model where it is no longer at its old place; ``overrides`` change the
    configuration that the adapter was trained with. Raises ConfigError for a folder that is
    neither, or damaged, and for the server's part of adapters that each client keeps its own of.
    """
    folder = Path(path)
    folder = folder / "adapter" if (folder / "config.toml").is_file() else folder
    file = folder / "rolora.json"
    if not file.is_file():
        raise ConfigError(
            f"{folder} is no adapter that rolora wrote (no rolora.json); "
            "if its run is unfinished, go on with: rolora resume"
        )
    try:
        notes = json.loads(file.read_text())
        settings, root, labels = notes["config"], Path(notes["root"]), tuple(notes["labels"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is damaged: {error!r}") from None
    moved = [] if model is None else [f"model.path={Path(model).resolve()}"]
    config = make_config(settings, [*moved, *overrides], root=root)
    _refuse_parts(config, folder)
    return Trained(folder, config, labels)


def _refuse_parts(config: RunConfig, folder: Path) -> None:
    """ConfigError for a method whose adapter folder holds a model that no client has."""
    method = make_method(config)
    if method.personal_roles:
        raise ConfigError(
            f"{folder} is the server's part of {method.name} alone, and each client has a "
            f"{'+'.join(sorted(method.personal_roles))} of its own: the run's report has the mean "
            "over their adapters; data.test, or data.client_test, says on which rows"
        )


def evaluate_adapter(
    path: str | Path, source: str, model: str | None = None, overrides: Sequence[str] = ()
) -> dict[str, float]:
    """Metrics of a finished run, or of an adapter folder that a run left, on other rows.

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
    """Name and metrics of each of these sets of rows, by name; see :func:`evaluate_adapter`.

    All sets are read before the model is loaded, and it is loaded once.
    """
    trained = find_adapter(path, model, overrides)
    config = trained.config
    split = config.data.test_split
    sets = {
        name: tables.read_table(source, root=Path(), split=split, offline=config.offline)
        for name, source in sources.items()
    }
    base, adapter = trained.load()
    task = make_task(config, base, trained.labels)
    for name, table in sets.items():
        examples = task.encode_test(table, sources[name])
        yield name, score(base, task, examples, config.eval, adapter)
