"""Figures of long tests, for docs/reliability.md: written if pytest was given ``--record``."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rolora.files import write_file

FOLDER = Path(__file__).parent.parent / "docs" / "reliability"


def machine() -> str:
    """Processor, cores and versions."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return (
        f"{model}, {os.cpu_count()} cores, one thread; Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )


@dataclass
class Record:
    """One section of the page: a title, a paragraph, columns, rows of text, how they were made."""

    name: str
    title: str
    about: str
    command: str
    columns: Sequence[str]
    seed: int
    wanted: bool
    texts: int = 1  # columns before the figures
    rows: list[Sequence[str]] = field(default_factory=list)

    def add(self, row: Sequence[str]) -> None:
        print(" | ".join(f"{c}: {v}" for c, v in zip(self.columns, row, strict=True)), flush=True)
        self.rows.append(row)

    def write(self) -> None:
        """``docs/reliability/NAME.json``, if it is wanted.

        A row takes the place of one of the same texts before its figures, so that some of the tests
        can be run again.
        """
        if not self.wanted:
            return
        FOLDER.mkdir(exist_ok=True)
        file = FOLDER / f"{self.name}.json"
        before = json.loads(file.read_text())["rows"] if file.exists() else []
        rows = {tuple(row[: self.texts]): list(row) for row in [*before, *self.rows]}
        values = {
            "title": self.title,
            "about": self.about,
            "command": self.command,
            "machine": machine(),
            "date": datetime.date.today().isoformat(),
            "seed": self.seed,
            "columns": self.columns,
            "rows": list(rows.values()),
        }
        write_file(file, json.dumps(values, indent=1) + "\n")
