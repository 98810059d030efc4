"""Write the table of docs/methods.md from the methods themselves: python docs/make_methods.py"""

from __future__ import annotations

from pathlib import Path

from pages import put

from rolora.cli.tables import roles_cell, yes_or_no
from rolora.files import write_file
from rolora.methods import get_method
from rolora.plan.dry_run import travels
from rolora.plan.method_table import MethodRow, describe_methods

PAGE = Path(__file__).with_name("methods.md")
OUT, WIDTH, RANK = 384, 384, 8  # a query layer of MiniLM


def table() -> list[str]:
    """A Markdown table with one row a method."""
    return [
        "| method | trains | up | down | bytes up | bytes down | keeps | exact | ranks | sums "
        "| server optimiser |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *(line(row) for row in describe_methods()),
    ]


def line(row: MethodRow) -> str:
    """One method's row."""
    first, second, third = travels(get_method(row.name), OUT, WIDTH, RANK)
    sends = row.up != ("nothing", "nothing")
    cells = [
        f"[`{row.name}`](#{row.name})",
        roles_cell(row.trains),
        roles_cell(row.up),
        roles_cell(row.down),
        f"{(first.bytes_up + second.bytes_up) // 2:,}",
        f"{(second.bytes_down + third.bytes_down) // 2:,}",
        roles_cell((row.keeps, row.keeps)),
        yes_or_no(row.exact),
        yes_or_no(row.ranks if sends else None),
        yes_or_no(row.secure if sends else None),
        yes_or_no(row.averaged if sends else None),
    ]
    return f"| {' | '.join(cells)} |"


def page(text: str) -> str:
    """The page with its table rewritten."""
    return put(text, "methods", table())


if __name__ == "__main__":
    write_file(PAGE, page(PAGE.read_text(encoding="utf-8")))
