"""What a command of these tests finds, for the page that is made from ``docs/reliability``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from benchmarks.harness import machine

FOLDER = Path(__file__).parent.parent / "docs" / "reliability"


def record(
    name: str, command: str, columns: Sequence[str], rows: Sequence[Sequence[object]]
) -> Path:
    """Write ``docs/reliability/NAME.json``: one table, and what made it, where and when.

    Rows that are there stay, but for those of the same first cell.
    """
    file, new = FOLDER / f"{name}.json", {row[0] for row in rows}
    kept = json.loads(file.read_text())["rows"] if file.exists() else []
    here = machine()
    told = f"{here['cpu']}, {here['cores']} cores, {here['system']}, Python {here['python']}"
    found = {
        "command": command,
        "machine": told,
        "date": date.today().isoformat(),
        "columns": list(columns),
        "rows": sorted([*map(list, rows), *(row for row in kept if row[0] not in new)]),
    }
    FOLDER.mkdir(exist_ok=True)
    file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return file
