"""Runs as one HTML page that opens offline: the reading in words, tables, figures, settings."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import tomli_w

from rolora.durable import write_file
from rolora.report import figures
from rolora.report.figures import Series, elided
from rolora.report.reading import about, clear_leader, reading, settings_apart, trailing_zeros
from rolora.report.summary import (
    MEGABYTE,
    Run,
    Standing,
    better,
    by_method,
    load_run,
    mean_sd,
    primary_metric,
    standing,
    summarise,
)
from rolora.report.svg import inline_svg
from rolora.tasks import HIGHER_IS_BETTER


@dataclass(frozen=True)
class Picture:
    """A figure as the page shows it. ``methods`` are those that the legend names."""

    title: str
    svg: str
    caption: str
    methods: tuple[str, ...] = ()


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write one self-contained HTML page about ``runs`` to ``out``, and return ``out``.

    The same run folders give the same bytes. Raises ConfigError or DataError (see ``load_run`` and
    ``primary_metric``), and ConfigError if there are no runs.
    """
    page = render([load_run(path) for path in runs])
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, page)
    return out
