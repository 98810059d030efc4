"""Rows from the ``datasets`` library: folders it has saved, and names on a hub."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from rolora.data.readers import named_classes, neighbour, require_as_large, usual_types
from rolora.errors import DataError, NotHere, nearest, one_line
from rolora.files import from_home
from rolora.network import HUB, is_reachable

HUB_NAME = re.compile(
    rf"({HUB})?(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?"
)


def read_folder(path: Path, source: str, split: str) -> pa.Table:
    """One split of what ``save_to_disk`` wrote.

    DataError, naming ``source``, if it is damaged, or unpacks to more than ``most_unpacked``.
    """
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    try:
        saved = datasets.load_from_disk(str(path))
        if not isinstance(saved, datasets.DatasetDict):
            saved = {split: saved}
        if split in saved:
            table = _table(saved[split])
            require_as_large(table, size)
            return table
    except Exception as error:  # a damaged folder raises errors of several libraries
        raise DataError(
            f"{source} looks like a folder written by datasets' save_to_disk, but cannot be read: "
            f"{one_line(error)}"
        ) from error
    raise DataError(f"{source} has no split {split!r}: {nearest(split, map(str, saved))}")


def read_hub(source: str, root: Path, split: str, offline: bool) -> pa.Table:
    """One split of ``hub:NAME``, ``hub:NAME:CONFIG`` or either with ``@REVISION`` behind it.

    It comes from the hub, or from the hub's cache; ``offline``: the cache only. "hub:" may be left
    out if there is no folder that would hold a file of this name. Raises DataError if neither has
    it.
    """
    name, path = HUB_NAME.fullmatch(source), root / from_home(source)
    owned = "/" in source and path.parent.is_dir() and not source.startswith(HUB)
    if not name or owned:
        looked = f"{source}: no such file or folder (looked in {root.resolve()}{neighbour(path)})"
        raise NotHere(
            looked + (f"; for the hub's rows, write {HUB}{source}" if name else ""), source
        )
    if Path(name["name"]).exists():  # datasets would take it, wherever the command is run
        raise DataError(
            f"{source} is on the hub, but {Path(name['name']).resolve()} has the same name: give a "
            "path that begins with ./, or work in another folder"
        )
    config = datasets.config
    alone = offline or config.HF_HUB_OFFLINE or not is_reachable(config.HF_ENDPOINT)
    try:
        with _told_offline(alone):
            return _table(
                datasets.load_dataset(
                    name["name"], name["config"], split=split, revision=name["revision"]
                )
            )
    except Exception as error:  # the hub's client raises errors of several libraries
        if alone:
            raise NotHere(_how_to_get(source, name, root, offline), source) from error
        raise DataError(
            f"{source} is not a file or folder in {root.resolve()}, and loading it from the hub "
            f"failed: {one_line(error)}"
        ) from error


def hub_splits(source: str) -> list[str]:
    """The splits of a hub name, as its page lists them; none where it cannot be asked."""
    name = HUB_NAME.fullmatch(source)
    if name is None or not is_reachable(datasets.config.HF_ENDPOINT):
        return []
    try:
        asked = datasets.get_dataset_split_names
        return list(map(str, asked(name["name"], name["config"], revision=name["revision"])))
    except Exception:  # the hub's client raises errors of several libraries
        return []


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
    asked += f", revision={name['revision']!r}" if name["revision"] else ""
    return (
        f"{source} is not a file or folder in {root.resolve()}, nor in the hub's cache, and {why}: "
        f"where there is a network, run datasets.load_dataset({asked}).save_to_disk('FOLDER'), and "
        "give the folder instead"
    )


def _table(rows: Any) -> pa.Table:
    """A Dataset as a table, classes by their names."""
    return named_classes(usual_types(rows.with_format("arrow")[:]))
