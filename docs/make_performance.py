"""Write the tables of docs/performance.md from the records of the benches.

python docs/make_performance.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.tables import blocks  # noqa: E402
from rolora.files import write_file  # noqa: E402

PAGE = Path(__file__).with_name("performance.md")
VERSIONS = re.compile(r"; (Python .*\.)$")


def shared_versions(tables: dict[str, str]) -> dict[str, str]:
    """The tables, with the versions in a block of their own if all records have the same."""
    found = {match[1] if (match := VERSIONS.search(table)) else "" for table in tables.values()}
    if len(found) != 1 or "" in found:
        return {**tables, "versions": "Versions are under each table."}
    short = {name: VERSIONS.sub(".", table) for name, table in tables.items()}
    return {**short, "versions": f"All tables: {found.pop()}"}


def page(text: str, tables: dict[str, str]) -> str:
    """The page with each table between its marks; a mark without a record says so."""

    def between(mark: re.Match[str]) -> str:
        table = tables.get(mark[1], "*Not measured yet: there is no record of it.*")
        return f"<!-- record:{mark[1]} -->\n\n{table}\n\n<!-- end -->"

    marks = r"<!-- record:([\w-]+) -->\n.*?<!-- end -->"
    return re.sub(marks, between, text, flags=re.DOTALL)


if __name__ == "__main__":
    tables = shared_versions(blocks(ROOT / "benchmarks" / "records"))
    write_file(PAGE, page(PAGE.read_text(encoding="utf-8"), tables))
