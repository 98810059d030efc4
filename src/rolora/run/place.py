"""Where a new run goes, decided before anything is loaded."""

from __future__ import annotations

import shlex
from pathlib import Path

from rolora.config.schema import RunConfig
from rolora.errors import ConfigError


def new_path(config: RunConfig, out: str | Path | None) -> Path:
    """The folder of a new run, by default ``runs/NAME``. ConfigError if it exists."""
    path = Path(out) if out is not None else Path("runs") / config.name
    require_new(path)
    return path


def require_new(path: Path) -> None:
    """ConfigError if there is something at ``path``."""
    if path.is_file():
        raise ConfigError(f"{path} is a file: name a new folder with --out")
    if path.exists():
        run = (path / "config.toml").is_file()
        hint = f", or continue it with: rolora resume {shlex.quote(str(path))}" if run else ""
        raise ConfigError(
            f"{path} exists and is not overwritten: name another folder with --out{hint}"
        )
