"""Rows that the ``datasets`` library gives: folders it has saved, and names on a hub."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from rolora.errors import DataError, NotHere, nearest, one_line
from rolora.network import is_reachable

HUB_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?")


def read_folder(path: Path, source: str, split: str) -> pa.Table:
    """One split of what ``save_to_disk`` wrote. DataError, naming ``source``, if it is not that."""
    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(
            f"{source} is a folder, but not one written by datasets' save_to_disk: "
            f"{one_line(error)}; for a file per client write {source.rstrip('/')}/*.csv"
        ) from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise DataError(f"{source} has no split {split!r}: {nearest(split, map(str, saved))}")
        saved = saved[split]
    return _with_label_names(saved)


def read_hub(source: str, root: Path, split: str, offline: bool) -> pa.Table:
    """One split of ``name`` or ``name:config`` from a hub, or from the hub's cache.

    ``offline``: the cache only. Raises DataError if neither has it.
    """
    name = HUB_NAME.fullmatch(source)
    if not name:
        looked = f"{source}: no such file or folder (looked in {root.resolve()})"
        raise NotHere(looked, source)
    config = datasets.config
    alone = offline or config.HF_HUB_OFFLINE or not is_reachable(config.HF_ENDPOINT)
    try:
        with _told_offline(alone):
            found = datasets.load_dataset(name["name"], name["config"], split=split)
    except Exception as error:  # the hub's client raises errors of several libraries
        if alone:
            raise NotHere(_how_to_get(source, name, root, offline), source) from error
        raise DataError(
            f"{source} is not a file or folder in {root.resolve()}, and loading it from the hub "
            f"failed: {one_line(error)}"
        ) from error
    return _with_label_names(found)


@contextlib.contextmanager
def _told_offline(alone: bool) -> Iterator[None]:
    """``datasets`` in offline mode if ``alone``: it would otherwise retry for half a minute."""
    config, logs = datasets.config, datasets.utils.logging
    before, verbosity = config.HF_HUB_OFFLINE, logs.get_verbosity()
    config.HF_HUB_OFFLINE = before or alone
    logs.set_verbosity_error()
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before
        logs.set_verbosity(verbosity)


def _how_to_get(source: str, name: re.Match[str], root: Path, offline: bool) -> str:
    why = "offline = true" if offline else "the hub does not answer"
    asked = ", ".join(repr(part) for part in (name["name"], name["config"]) if part)
    return (
        f"{source} is not a file or folder in {root.resolve()}, nor in the hub's cache, and {why}: "
        f"where there is a network, run datasets.load_dataset({asked}).save_to_disk('FOLDER'), and "
        "give the folder instead"
    )


def _with_label_names(rows: Any) -> pa.Table:
    """A Dataset as a table, classes by their names; its -1, an unknown class, is missing."""
    table: pa.Table = rows.with_format("arrow")[:]
    for place, (column, feature) in enumerate(rows.features.items()):
        if names := getattr(feature, "names", None):
            known = {number: str(name) for number, name in enumerate(names)}
            values = [known.get(number) for number in table[column].to_pylist()]
            table = table.set_column(place, column, pa.array(values, pa.string()))
    return table
