"""Write the sections of docs/reliability.md from docs/reliability/NAME.json.

python docs/make_reliability.py

A record has "command", "machine", "date", "columns" and "rows", and may have "title" (left out: its
name), "about" (a paragraph), "seed" and "minutes". A long test writes its record if pytest is given
--record.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pages import put

from rolora.files import write_file

PAGE = Path(__file__).with_name("reliability.md")
RECORDS = Path(__file__).with_name("reliability")
ORDER = ("faults", "soak", "mutants", "fuzzing")  # any others follow by name


def section(name: str, record: Mapping[str, Any]) -> list[str]:
    """A heading, what was done, the table, and how it was made."""
    made = [f"`{record['command']}`"]
    if "seed" in record:
        made.append(f"seed {record['seed']}")
    if "minutes" in record:
        made.append(f"{record['minutes']} minutes")
    return [
        f"## {record.get('title', name.capitalize())}",
        "",
        *([record["about"], ""] if "about" in record else []),
        f"| {' | '.join(record['columns'])} |",
        f"|{'---|' * len(record['columns'])}",
        *(f"| {' | '.join(map(str, row))} |" for row in record["rows"]),
        "",
        f"{', '.join(made)}, on {record['date']}: {record['machine']}.",
        "",
    ]


def page(text: str, records: Mapping[str, Mapping[str, Any]]) -> str:
    """The page with a section for each record."""
    names = [name for name in ORDER if name in records]
    names += sorted(records.keys() - set(ORDER))
    lines = [line for name in names for line in section(name, records[name])]
    return put(text, "records", lines[:-1])


def records() -> dict[str, Mapping[str, Any]]:
    """Name -> record."""
    return {file.stem: json.loads(file.read_text()) for file in sorted(RECORDS.glob("*.json"))}


if __name__ == "__main__":
    write_file(PAGE, page(PAGE.read_text(encoding="utf-8"), records()))
